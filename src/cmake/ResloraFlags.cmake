# What every target of ours is compiled with; nothing here reaches a program that links reslora.

function(reslora_own_target name)
  set_target_properties(${name} PROPERTIES
    CXX_STANDARD ${RESLORA_CXX_STANDARD} CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON POSITION_INDEPENDENT_CODE ON
    UNITY_BUILD OFF)  # not of whoever includes this project: reslora_compile_together says which
  target_compile_options(${name} PRIVATE -Wall -Wextra $<$<BOOL:${RESLORA_WERROR}>:-Werror>)
  # g++ sees overlaps and overruns in std::string and std::vector that are not there, each release
  # in other places; later ones also see unset members of tensors in std::optional.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${name} PRIVATE
      -Wno-restrict -Wno-array-bounds -Wno-stringop-overflow -Wno-stringop-overread
      $<$<VERSION_GREATER_EQUAL:$<CXX_COMPILER_VERSION>,13>:-Wno-maybe-uninitialized>)
  endif()
  foreach(sanitizer IN LISTS RESLORA_SANITIZE)
    target_compile_options(${name} PRIVATE -fsanitize=${sanitizer} -fno-omit-frame-pointer)
    target_link_options(${name} PRIVATE -fsanitize=${sanitizer})
  endforeach()
endfunction()

# Lets the files of `name` that share a UNITY_GROUP be compiled as one; others stay alone. Without
# paths of this checkout in them, ccache knows the groups in another one (from CMake 4 on).
function(reslora_compile_together name)
  set_target_properties(${name} PROPERTIES
    UNITY_BUILD ${RESLORA_UNITY} UNITY_BUILD_MODE GROUP UNITY_BUILD_RELOCATABLE ON)
endfunction()
