# Finds a CUDA toolkit and decides whether the kernels of src/cuda are built into the library.
#
# RESLORA_CUDA        AUTO: on where nvcc is found and torch has CUDA of the same major version;
#                     ON: a sentence and the end where that is not so; OFF
# RESLORA_NVCC        the compiler; RESLORA_CUDA_ARCHITECTURES: what it compiles for
# RESLORA_WITH_CUDA   the decision
# RESLORA_CUDA_INCLUDE  folder of the toolkit's headers, empty where there is none
#
# nvcc is called by custom commands, not as a CMake language: the kernels need no torch, no device
# linking and no search for a CUDA compiler's features, and their ptxas reports are kept.

set(RESLORA_CUDA "AUTO" CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE RESLORA_CUDA PROPERTY STRINGS AUTO ON OFF)
set(RESLORA_CUDA_ARCHITECTURES "80;90" CACHE STRING "Compute capabilities; the last one as PTX too")
find_program(RESLORA_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)

set(RESLORA_CUDA_INCLUDE "")
if(RESLORA_NVCC)
  file(REAL_PATH "${RESLORA_NVCC}" _nvcc)
  get_filename_component(_toolkit "${_nvcc}/../.." ABSOLUTE)
  file(GLOB _folders "${_toolkit}/include" "${_toolkit}/targets/*/include"
       "${RESLORA_TORCH_ROOT}/../nvidia/*/include")
else()
  file(GLOB _folders "${RESLORA_TORCH_ROOT}/../nvidia/*/include")
endif()
foreach(_folder IN LISTS _folders)
  if(NOT RESLORA_CUDA_INCLUDE AND EXISTS "${_folder}/cuda_bf16.h" AND EXISTS "${_folder}/crt/host_defines.h")
    set(RESLORA_CUDA_INCLUDE "${_folder}")
  endif()
endforeach()

set(_reslora_nvcc_options -std=c++17 "-ccbin=${CMAKE_CXX_COMPILER}")
foreach(_arch IN LISTS RESLORA_CUDA_ARCHITECTURES)
  list(APPEND _reslora_nvcc_options "-gencode=arch=compute_${_arch},code=sm_${_arch}")
endforeach()
list(GET RESLORA_CUDA_ARCHITECTURES -1 _arch)
list(APPEND _reslora_nvcc_options "-gencode=arch=compute_${_arch},code=compute_${_arch}")

# Sets `reason` to why the kernels cannot be built, or to nothing.
function(_reslora_refusal reason)
  set(${reason} "" PARENT_SCOPE)
  if(NOT RESLORA_NVCC OR NOT RESLORA_CUDA_INCLUDE)
    set(${reason} "no CUDA toolkit was found; put nvcc on PATH or set CUDA_HOME" PARENT_SCOPE)
    return()
  endif()
  if(NOT EXISTS "${RESLORA_TORCH_ROOT}/lib/libtorch_cuda.so")
    set(${reason} "torch in ${RESLORA_TORCH_ROOT} was built without CUDA" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${RESLORA_NVCC}" --version OUTPUT_VARIABLE _printed ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+)" _release "${_printed}")
  set(_nvcc_major "${CMAKE_MATCH_1}")
  string(REGEX MATCH "^[0-9]+" _torch_major "${RESLORA_TORCH_CUDA}")
  if(_torch_major AND NOT _nvcc_major STREQUAL _torch_major)
    set(${reason} "nvcc is of CUDA ${_nvcc_major} and torch of CUDA ${_torch_major}" PARENT_SCOPE)
    return()
  endif()
  # A host compiler that is too new, or an architecture that is gone, shows in one small file.
  set(_probe "${CMAKE_BINARY_DIR}/CMakeFiles/reslora_probe.cu")
  file(WRITE "${_probe}" "#include <cuda_bf16.h>\n#include <mma.h>\n__global__ void probe() {}\n")
  execute_process(
    COMMAND "${RESLORA_NVCC}" ${_reslora_nvcc_options} -c "${_probe}" -o "${_probe}.o"
    RESULT_VARIABLE _result OUTPUT_VARIABLE _printed ERROR_VARIABLE _printed)
  if(NOT _result EQUAL 0)
    string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" _error "${_printed}")
    set(${reason} "nvcc fails with ${CMAKE_CXX_COMPILER} for ${RESLORA_CUDA_ARCHITECTURES}: ${_error}"
        PARENT_SCOPE)
  endif()
endfunction()

set(RESLORA_WITH_CUDA OFF)
if(RESLORA_CUDA STREQUAL "AUTO" OR RESLORA_CUDA)
  _reslora_refusal(_refusal)
  if(NOT _refusal)
    set(RESLORA_WITH_CUDA ON)
  elseif(NOT RESLORA_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "RESLORA_CUDA is ${RESLORA_CUDA}, but ${_refusal}.")
  else()
    message(STATUS "reslora: without CUDA kernels, since ${_refusal}")
  endif()
endif()

# Compiles the kernels' files and sets `objects` to the results; beside each lies NAME.ptxas, what
# ptxas says of registers and spills.
function(reslora_cuda_objects objects)
  set(_options ${_reslora_nvcc_options} -O3 -Xptxas=-v
      -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra)
  if(RESLORA_WERROR)
    list(APPEND _options -Werror=all-warnings)
  endif()
  file(GLOB _headers CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.h" "${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cuh")
  file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/cuda")
  set(_objects "")
  foreach(_source IN LISTS ARGN)
    get_filename_component(_name "${_source}" NAME_WE)
    set(_object "${CMAKE_CURRENT_BINARY_DIR}/cuda/${_name}.o")
    add_custom_command(OUTPUT "${_object}"
      BYPRODUCTS "${CMAKE_CURRENT_BINARY_DIR}/cuda/${_name}.ptxas"
      COMMAND "${CMAKE_COMMAND}" "-DREPORT=${CMAKE_CURRENT_BINARY_DIR}/cuda/${_name}.ptxas"
              -P "${PROJECT_SOURCE_DIR}/src/cmake/compile_cuda.cmake"
              -- ${RESLORA_LAUNCHER} "${RESLORA_NVCC}" ${_options} -c "${CMAKE_CURRENT_SOURCE_DIR}/${_source}" -o "${_object}"
      DEPENDS "${_source}" ${_headers} "${PROJECT_SOURCE_DIR}/src/cmake/compile_cuda.cmake"
      COMMENT "Compiling the CUDA kernel ${_name}" VERBATIM)
    list(APPEND _objects "${_object}")
  endforeach()
  set(${objects} "${_objects}" PARENT_SCOPE)
endfunction()
