# Refuses a C++ compiler that is too old, and looks for ccache.
#
# RESLORA_LAUNCHER  what stands before a compiler's command: ccache, or nothing. A list that may be
#                   empty, so that it can be written into a command as it is.

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11)
  message(FATAL_ERROR "reslora needs g++ 11 or newer; got ${CMAKE_CXX_COMPILER_VERSION} "
                      "(${CMAKE_CXX_COMPILER}): install a newer one and name it with CXX=.")
endif()

# A ccache that cannot write to its folder fails every compile, so it is tried on a small file.
function(_reslora_find_launcher launcher)
  set(${launcher} "" PARENT_SCOPE)
  find_program(CCACHE_PROGRAM ccache)
  if(NOT CCACHE_PROGRAM)
    return()
  endif()
  set(_probe "${CMAKE_BINARY_DIR}/CMakeFiles/reslora_ccache.cpp")
  file(WRITE "${_probe}" "int probe() { return 0; }\n")
  execute_process(COMMAND "${CCACHE_PROGRAM}" "${CMAKE_CXX_COMPILER}" -c "${_probe}" -o "${_probe}.o"
                  RESULT_VARIABLE _result OUTPUT_QUIET ERROR_QUIET)
  if(_result EQUAL 0)
    set(${launcher} "${CCACHE_PROGRAM}" PARENT_SCOPE)
  endif()
endfunction()

_reslora_find_launcher(RESLORA_LAUNCHER)
if(RESLORA_LAUNCHER AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${RESLORA_LAUNCHER}")
endif()
