# The CUDA kernels, and their execution on the CPU for tests.

option(FASTPE_EMU "Build the CUDA kernels for the emulator (tests only; needs x86-64)" OFF)

# One instance file per element type and kind of bias.
set(FASTPE_CUDA_SOURCES csrc/cuda/attn_fwd.cu csrc/cuda/attn_bwd.cu csrc/cuda/elementwise.cu)
foreach(type Bf16 F16)
  foreach(kind none rel table form)
    foreach(pass fwd bwd)
      set(instance "${CMAKE_CURRENT_BINARY_DIR}/generated/attn_${pass}_${type}_${kind}.cu")
      configure_file(csrc/cuda/attn_${pass}_inst.cu.in "${instance}" @ONLY)
      list(APPEND FASTPE_CUDA_SOURCES "${instance}")
    endforeach()
  endforeach()
endforeach()

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

  # The kernels themselves, through the same launch code, as torch.ops.fastpe_emu.
  set_source_files_properties(${FASTPE_CUDA_SOURCES} PROPERTIES LANGUAGE CXX)
  add_library(fastpe_emu_ops SHARED csrc/emu/ops_emu.cpp ${FASTPE_CUDA_SOURCES})
  target_compile_definitions(fastpe_emu_ops PRIVATE TORCH_TARGET_VERSION=0x020a000000000000ULL)
  target_include_directories(fastpe_emu_ops SYSTEM PRIVATE "${FASTPE_TORCH_DIR}/include")
  target_compile_options(fastpe_emu_ops PRIVATE -O1)
  target_link_libraries(fastpe_emu_ops PRIVATE fastpe_options fastpe_emu "${FASTPE_TORCH_LIBRARY}" "${FASTPE_TORCH_CPU_LIBRARY}")
  target_link_options(fastpe_emu_ops PRIVATE -Wl,--no-undefined -Wl,--as-needed)

  set_target_properties(fastpe_emu fastpe_emu_tests fastpe_emu_ops PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/emu" BUILD_RPATH "$ORIGIN;${FASTPE_TORCH_DIR}/lib" BUILD_WITH_INSTALL_RPATH OFF)
endif()
