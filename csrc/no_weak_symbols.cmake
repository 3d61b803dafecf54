# cmake -DNM=... -DOBJECTS=a.o|b.o -P no_weak_symbols.cmake
# The linker keeps one copy of a weak function (an inline or template instantiation). Were it the AVX-512 one,
# the portable path would run it too, and stop with an illegal instruction on an older processor. So kernel
# objects may define none.
string(REPLACE "|" ";" OBJECTS "${OBJECTS}")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C --defined-only ${object}
                  OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
  list(FILTER weak EXCLUDE REGEX "DW\\.ref\\.") # a pointer that sanitizers add
  if(weak)
    message(FATAL_ERROR "${object} defines weak symbols: ${weak}")
  endif()
endforeach()
