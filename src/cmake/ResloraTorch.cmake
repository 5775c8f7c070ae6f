# Finds torch (a wheel or a LibTorch folder) and makes the target `reslora_torch` of it; read by the
# build of reslora and by the installed package.
#
# torch's own package file insists on a CUDA toolkit wherever torch was built with CUDA, looks for
# NVTX in our source tree, and sets global flags. We need three libraries and two include folders, so
# we take those, one way for every torch.

set(RESLORA_TORCH_ROOT "" CACHE PATH "Folder of torch with include/ and lib/ (empty: search)")

# Sets RESLORA_TORCH_ROOT, for this run of CMake: as find_package(Torch) found it, from
# CMAKE_PREFIX_PATH (…/share/cmake or the folder itself), from the folders of ARGN, or from the
# Python interpreter at hand.
function(_reslora_search_torch)
  set(hints "${TORCH_INSTALL_PREFIX}" ${CMAKE_PREFIX_PATH} ${ARGN})
  if(Torch_DIR)
    list(PREPEND hints "${Torch_DIR}/../../..")
  endif()
  find_path(libraries NAMES libtorch_cpu.so
            PATH_SUFFIXES lib ../../lib NO_DEFAULT_PATH PATHS ${hints} NO_CACHE)
  set(root "")
  if(libraries)
    get_filename_component(root "${libraries}/.." ABSOLUTE)
  else()
    find_package(Python COMPONENTS Interpreter QUIET)
    if(Python_EXECUTABLE)
      execute_process(
        COMMAND "${Python_EXECUTABLE}" -c
                "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
        OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
  endif()
  set(RESLORA_TORCH_ROOT "${root}" PARENT_SCOPE)
endfunction()

# Sets RESLORA_TORCH_VERSION (empty without headers), _MINOR and RESLORA_CXX_STANDARD.
macro(_reslora_read_torch_version)
  set(_lines "")
  foreach(_header csrc/api/include/torch/version.h headeronly/version.h)
    if(NOT _lines AND EXISTS "${RESLORA_TORCH_ROOT}/include/torch/${_header}")
      file(STRINGS "${RESLORA_TORCH_ROOT}/include/torch/${_header}" _lines
           REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH)")
    endif()
  endforeach()
  string(REGEX REPLACE "[^0-9;]+([0-9]+)" "\\1" _numbers "${_lines}")
  list(JOIN _numbers "." RESLORA_TORCH_VERSION)
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" RESLORA_TORCH_MINOR "${RESLORA_TORCH_VERSION}")
  # torch's headers are C++20 from 2.13 on.
  if(RESLORA_TORCH_VERSION VERSION_GREATER_EQUAL 2.13)
    set(RESLORA_CXX_STANDARD 20)
  else()
    set(RESLORA_CXX_STANDARD 17)
  endif()
endmacro()

# Sets RESLORA_TORCH_CUDA: the CUDA that torch was built with, empty for a torch without it. A wheel
# says it in version.py ("13.2"), a LibTorch folder by the runtime that its libraries need ("13").
macro(_reslora_read_torch_cuda)
  set(_line "")
  if(EXISTS "${RESLORA_TORCH_ROOT}/version.py")
    file(STRINGS "${RESLORA_TORCH_ROOT}/version.py" _line REGEX "^cuda.*'[0-9]+\\.")
  elseif(EXISTS "${RESLORA_TORCH_ROOT}/lib/libc10_cuda.so")
    file(STRINGS "${RESLORA_TORCH_ROOT}/lib/libc10_cuda.so" _line
         REGEX "^libcudart\\.so\\.[0-9]+" LIMIT_COUNT 1)
  endif()
  string(REGEX MATCH "[0-9]+(\\.[0-9]+)?" RESLORA_TORCH_CUDA "${_line}")
endmacro()

# Makes `reslora_torch`, or sets RESLORA_TORCH_ERROR to a sentence that says what is wrong. ARGN:
# more folders to search.
macro(reslora_find_torch minimum)
  set(RESLORA_TORCH_ERROR "")
  if(NOT RESLORA_TORCH_ROOT)
    _reslora_search_torch(${ARGN})
  endif()
  if(NOT EXISTS "${RESLORA_TORCH_ROOT}/lib/libtorch_cpu.so")
    set(RESLORA_TORCH_ERROR
        "reslora needs torch, and none was found: install it (pip install torch) or \
pass -DRESLORA_TORCH_ROOT=<folder with include/ and lib/>; got '${RESLORA_TORCH_ROOT}'.")
  else()
    _reslora_read_torch_version()
    _reslora_read_torch_cuda()
    if(NOT RESLORA_TORCH_VERSION)
      set(RESLORA_TORCH_ERROR "reslora needs torch with its headers; got none in \
${RESLORA_TORCH_ROOT}/include: pass -DRESLORA_TORCH_ROOT=<folder with include/ and lib/>.")
    elseif(RESLORA_TORCH_VERSION VERSION_LESS ${minimum})
      set(RESLORA_TORCH_ERROR "reslora needs torch >= ${minimum}; got ${RESLORA_TORCH_VERSION} in \
${RESLORA_TORCH_ROOT}.")
    elseif(NOT TARGET reslora_torch)
      add_library(reslora_torch INTERFACE IMPORTED GLOBAL)
      target_include_directories(reslora_torch SYSTEM INTERFACE
        "${RESLORA_TORCH_ROOT}/include"
        "${RESLORA_TORCH_ROOT}/include/torch/csrc/api/include")
      set(_libraries libtorch.so libtorch_cpu.so libc10.so)
      list(TRANSFORM _libraries PREPEND "${RESLORA_TORCH_ROOT}/lib/")
      target_link_libraries(reslora_torch INTERFACE ${_libraries})
      # Kept in programs that have no symbol of theirs, where the linker is told --as-needed, as by
      # many distributions: libtorch.so has none and brings torch's CUDA libraries along, and what
      # the program needs itself is found by the program's path.
      list(JOIN _libraries "," _libraries)
      target_link_options(reslora_torch INTERFACE
        "LINKER:--push-state,--no-as-needed,${_libraries},--pop-state")
      # The libraries beside a CUDA build of torch (cudart and friends) are found by its own rpath at
      # run time; the linker must not insist on seeing them.
      target_link_options(reslora_torch INTERFACE "LINKER:--allow-shlib-undefined")
      target_compile_features(reslora_torch INTERFACE cxx_std_${RESLORA_CXX_STANDARD})
    endif()
  endif()
endmacro()
