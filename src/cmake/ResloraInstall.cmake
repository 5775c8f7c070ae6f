# What `cmake --install` and the wheel hand to C++ programs: headers, the CMake package, pkg-config.
include(CMakePackageConfigHelpers)

# Installs headers and the CMake package to `prefix` (empty: the prefix itself). `library`: where
# libreslora lies below it; `soname`: its name for the loader; `built_with`: a folder of torch to
# look into, "" in a wheel, whose torch lies beside it.
function(reslora_install_package component prefix package library soname built_with)
  set(RESLORA_LIBRARY "${library}")
  set(RESLORA_SONAME "${soname}")
  set(RESLORA_BUILT_WITH "${built_with}")
  set(made "${CMAKE_CURRENT_BINARY_DIR}/package-${component}")
  configure_file("${PROJECT_SOURCE_DIR}/src/cmake/reslora-config.cmake.in"
                 "${made}/reslora-config.cmake" @ONLY)
  write_basic_package_version_file("${made}/reslora-config-version.cmake"
                                   COMPATIBILITY SameMinorVersion)
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/reslora" DESTINATION "${prefix}include"
          COMPONENT ${component})
  install(FILES "${made}/reslora-config.cmake" "${made}/reslora-config-version.cmake"
                "${PROJECT_SOURCE_DIR}/src/cmake/ResloraTorch.cmake"
          DESTINATION "${prefix}${package}" COMPONENT ${component})
endfunction()
