# What `cmake --install` and the wheel hand to C++ programs: headers, the CMake package, pkg-config.
include(CMakePackageConfigHelpers)

# Installs the library, its headers and the CMake package to `prefix` (empty: the prefix itself), the
# library to its folder `libraries` and the package to `package`. `built_with`: a folder of torch to
# look into, "" in a wheel, whose torch lies beside it. The package is in the build folder, too. One
# build makes one package: a project that adds this one as a folder and exports what links reslora
# gets a name for it in these targets, and CMake refuses two.
function(reslora_install_package component prefix libraries package built_with)
  set(RESLORA_BUILT_WITH "${built_with}")
  set(made "${CMAKE_CURRENT_BINARY_DIR}/package-${component}")
  configure_file("${PROJECT_SOURCE_DIR}/src/cmake/reslora-config.cmake.in"
                 "${made}/reslora-config.cmake" @ONLY)
  configure_file("${PROJECT_SOURCE_DIR}/src/cmake/ResloraTorch.cmake"
                 "${made}/ResloraTorch.cmake" COPYONLY)
  write_basic_package_version_file("${made}/reslora-config-version.cmake"
                                   COMPATIBILITY SameMinorVersion)
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/reslora" DESTINATION "${prefix}include"
          COMPONENT ${component})
  install(FILES "${made}/reslora-config.cmake" "${made}/reslora-config-version.cmake"
                "${made}/ResloraTorch.cmake"
          DESTINATION "${prefix}${package}" COMPONENT ${component})
  install(TARGETS reslora EXPORT reslora-targets
          LIBRARY DESTINATION "${prefix}${libraries}" COMPONENT ${component}
          INCLUDES DESTINATION "${prefix}include")
  install(EXPORT reslora-targets NAMESPACE reslora:: DESTINATION "${prefix}${package}"
          COMPONENT ${component})
  export(EXPORT reslora-targets NAMESPACE reslora:: FILE "${made}/reslora-targets.cmake")
endfunction()
