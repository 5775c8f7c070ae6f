# Runs nvcc and keeps what ptxas reports, which nvcc prints among its warnings.
#
#   cmake -DREPORT=<file> -P compile_cuda.cmake -- nvcc <options>
set(_command "")
set(_is_command OFF)
math(EXPR _last "${CMAKE_ARGC} - 1")
foreach(_i RANGE ${_last})
  if(_is_command)
    list(APPEND _command "${CMAKE_ARGV${_i}}")
  elseif(CMAKE_ARGV${_i} STREQUAL "--")
    set(_is_command ON)
  endif()
endforeach()
# One variable for both, in the order that the compiler wrote.
execute_process(COMMAND ${_command}
                RESULT_VARIABLE _result OUTPUT_VARIABLE _printed ERROR_VARIABLE _printed)
file(WRITE "${REPORT}" "${_printed}")
if(NOT _result EQUAL 0)
  list(JOIN _command " " _shown)
  # As a notice, since an error's text is folded and indented.
  message(NOTICE "${_printed}")
  message(FATAL_ERROR "this command ended with ${_result}: ${_shown}")
endif()
