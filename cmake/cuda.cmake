# The CUDA kernels, and their execution on the CPU for tests.

option(FASTPE_EMU "Build the CUDA kernels for the emulator (tests only; needs x86-64)" OFF)

if(FASTPE_EMU)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    message(FATAL_ERROR "FASTPE_EMU=ON: the emulator runs on x86-64 only, this is ${CMAKE_SYSTEM_PROCESSOR}")
  endif()
  find_package(Threads REQUIRED)

  add_library(fastpe_emu SHARED csrc/emu/emu.cpp)
  target_link_libraries(fastpe_emu PRIVATE fastpe_options PUBLIC Threads::Threads)
  # Threads switch stacks behind the compiler's back but never change the OS thread.
  target_compile_options(fastpe_emu PRIVATE -fvisibility=default -ftls-model=initial-exec)

  pybind11_add_module(fastpe_emu_tests MODULE NO_EXTRAS tests/emu/module.cpp)
  # Kernels are switched between, not run fast: -O1 compiles them in half the time.
  target_compile_options(fastpe_emu_tests PRIVATE -O1)
  target_link_libraries(fastpe_emu_tests PRIVATE fastpe_options fastpe_emu)
  set_target_properties(fastpe_emu fastpe_emu_tests PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/emu" BUILD_RPATH "$ORIGIN" BUILD_WITH_INSTALL_RPATH OFF)
endif()
