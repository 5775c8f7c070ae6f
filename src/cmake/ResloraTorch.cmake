# Makes the target `reslora_torch` from an installed torch (a wheel or a LibTorch folder).
#
# torch's own package file insists on a CUDA toolkit wherever torch was built with CUDA, looks for
# NVTX in our source tree, and sets global flags. We need three libraries and two include folders, so
# we take those, one way for every torch. The folder comes from RESLORA_TORCH_ROOT, from
# CMAKE_PREFIX_PATH (…/share/cmake or the folder itself), or from the Python interpreter at hand.

set(RESLORA_TORCH_ROOT "" CACHE PATH "Folder of torch with include/ and lib/ (empty: search)")
set(_reslora_minimum_torch 2.11)

if(NOT RESLORA_TORCH_ROOT)
  find_path(_reslora_torch_lib NAMES libtorch_cpu.so
            PATH_SUFFIXES lib ../../lib NO_DEFAULT_PATH PATHS ${CMAKE_PREFIX_PATH} NO_CACHE)
  if(_reslora_torch_lib)
    get_filename_component(_root "${_reslora_torch_lib}/.." ABSOLUTE)
  else()
    find_package(Python COMPONENTS Interpreter QUIET)
    if(Python_EXECUTABLE)
      execute_process(
        COMMAND "${Python_EXECUTABLE}" -c
                "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
        OUTPUT_VARIABLE _root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
  endif()
  set(RESLORA_TORCH_ROOT "${_root}" CACHE PATH "" FORCE)
endif()
if(NOT EXISTS "${RESLORA_TORCH_ROOT}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "reslora needs torch >= ${_reslora_minimum_torch}, and none was found: install it "
                      "(pip install torch) or pass -DRESLORA_TORCH_ROOT=<folder with include/ and lib/>; "
                      "got '${RESLORA_TORCH_ROOT}'.")
endif()

file(STRINGS "${RESLORA_TORCH_ROOT}/include/torch/csrc/api/include/torch/version.h" _lines
     REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH)")
if(NOT _lines)
  file(STRINGS "${RESLORA_TORCH_ROOT}/include/torch/headeronly/version.h" _lines
       REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH)")
endif()
string(REGEX REPLACE "[^0-9;]+([0-9]+)" "\\1" _numbers "${_lines}")
list(JOIN _numbers "." RESLORA_TORCH_VERSION)
if(RESLORA_TORCH_VERSION VERSION_LESS _reslora_minimum_torch)
  message(FATAL_ERROR "reslora needs torch >= ${_reslora_minimum_torch}; got ${RESLORA_TORCH_VERSION} "
                      "in ${RESLORA_TORCH_ROOT}.")
endif()
string(REGEX MATCH "^[0-9]+\\.[0-9]+" RESLORA_TORCH_MINOR "${RESLORA_TORCH_VERSION}")

# torch's headers are C++20 from 2.13 on.
if(RESLORA_TORCH_VERSION VERSION_GREATER_EQUAL 2.13)
  set(RESLORA_CXX_STANDARD 20)
else()
  set(RESLORA_CXX_STANDARD 17)
endif()

add_library(reslora_torch INTERFACE)
target_include_directories(reslora_torch SYSTEM INTERFACE
  "$<BUILD_INTERFACE:${RESLORA_TORCH_ROOT}/include>"
  "$<BUILD_INTERFACE:${RESLORA_TORCH_ROOT}/include/torch/csrc/api/include>")
target_link_libraries(reslora_torch INTERFACE
  "$<BUILD_INTERFACE:${RESLORA_TORCH_ROOT}/lib/libtorch.so>"
  "$<BUILD_INTERFACE:${RESLORA_TORCH_ROOT}/lib/libtorch_cpu.so>"
  "$<BUILD_INTERFACE:${RESLORA_TORCH_ROOT}/lib/libc10.so>")
# The libraries beside a CUDA build of torch (cudart and friends) are found by its own rpath at run
# time; the linker must not insist on seeing them.
target_link_options(reslora_torch INTERFACE "LINKER:--allow-shlib-undefined")
target_compile_features(reslora_torch INTERFACE cxx_std_${RESLORA_CXX_STANDARD})
