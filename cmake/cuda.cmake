# The CUDA kernels, and their execution on the CPU for tests.

option(FASTPE_EMU "Build the CUDA kernels for the emulator (tests only; needs x86-64)" OFF)
set(FASTPE_CUDA_ARCHITECTURES "80;90a-real" CACHE STRING "GPU architectures: 80 is machine code for 8.0 and PTX that newer GPUs translate, 90a-real machine code for Hopper")

# One instance file per element type and kernel, and of attention per kind of bias; float32 has one kind for all.
set(FASTPE_CUDA_SOURCES csrc/cuda/attn_fwd.cu csrc/cuda/attn_bwd.cu csrc/cuda/cope.cu csrc/cuda/decode.cu csrc/cuda/device.cu csrc/cuda/elementwise.cu csrc/cuda/landmark.cu csrc/cuda/merge.cu)
foreach(type Bf16 F16 F32)
  set(kernels attn_bwd_terms attn_decode cope landmark_fwd landmark_bwd)
  set(kinds none rel table form composed)
  if(type STREQUAL "F32")
    set(kernels attn_bwd_terms)
    set(kinds composed)
  endif()
  foreach(kernel ${kernels})
    set(instance "${CMAKE_CURRENT_BINARY_DIR}/generated/${kernel}_${type}.cu")
    configure_file(csrc/cuda/${kernel}_inst.cu.in "${instance}" @ONLY)
    list(APPEND FASTPE_CUDA_SOURCES "${instance}")
  endforeach()
  foreach(kind ${kinds})
    foreach(pass fwd bwd)
      set(instance "${CMAKE_CURRENT_BINARY_DIR}/generated/attn_${pass}_${type}_${kind}.cu")
      configure_file(csrc/cuda/attn_${pass}_inst.cu.in "${instance}" @ONLY)
      list(APPEND FASTPE_CUDA_SOURCES "${instance}")
    endforeach()
  endforeach()
endforeach()

# ---- for GPUs -------------------------------------------------------------------------------------------------------
# The library is loaded only by a torch that has CUDA, so AUTO builds it only for one. ON builds it whatever torch is
# installed: it links against any, with one symbol (aoti_torch_get_current_cuda_stream) left to the torch that loads it.

set(FASTPE_CUDA_BUILT "")
if(FASTPE_CUDA STREQUAL "AUTO" AND NOT FASTPE_EMU)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import runpy, sys; print(runpy.run_path(sys.argv[1]).get('cuda') or '')" "${FASTPE_TORCH_DIR}/version.py"
    OUTPUT_VARIABLE torch_cuda OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(torch_cuda)
    include(CheckLanguage)
    check_language(CUDA)
  endif()
endif()
if(FASTPE_CUDA STREQUAL "ON" OR (FASTPE_CUDA STREQUAL "AUTO" AND CMAKE_CUDA_COMPILER))
  if(FASTPE_EMU)
    message(FATAL_ERROR "FASTPE_EMU=ON and FASTPE_CUDA=ON compile the same files with two compilers; use two build folders")
  endif()
  set(CMAKE_CUDA_ARCHITECTURES "${FASTPE_CUDA_ARCHITECTURES}")
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
    if(FASTPE_CUDA STREQUAL "ON")
      message(FATAL_ERROR "FASTPE_CUDA=ON needs a CUDA toolkit of version 12.4 or later, found ${CMAKE_CUDA_COMPILER_VERSION}")
    endif()
    message(STATUS "CUDA kernels are not built: the toolkit is ${CMAKE_CUDA_COMPILER_VERSION}, 12.4 or later is needed")
  else()
    set(FASTPE_CUDA_BUILT "${FASTPE_CUDA_ARCHITECTURES}")
  endif()
endif()

if(FASTPE_CUDA_BUILT)
  # The kernels know no torch; registers and spills of every kernel go to the build log, which a test reads.
  add_library(fastpe_cuda_kernels OBJECT ${FASTPE_CUDA_SOURCES})
  target_include_directories(fastpe_cuda_kernels PRIVATE csrc)
  target_compile_options(fastpe_cuda_kernels PRIVATE
    --expt-relaxed-constexpr -Xptxas -v -Werror cross-execution-space-call
    "SHELL:-Xcompiler=-ffp-contract=off,-Wall,-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=")
  add_library(fastpe_cuda SHARED csrc/binding/ops_cuda.cpp $<TARGET_OBJECTS:fastpe_cuda_kernels>)
  target_compile_definitions(fastpe_cuda PRIVATE TORCH_TARGET_VERSION=0x020a000000000000ULL USE_CUDA)
  target_include_directories(fastpe_cuda SYSTEM PRIVATE "${FASTPE_TORCH_DIR}/include")
  target_link_libraries(fastpe_cuda PRIVATE fastpe_options "${FASTPE_TORCH_CPU_LIBRARY}")
  # libtorch.so must stay a dependency though nothing of it is named: it brings libtorch_cuda.so.
  target_link_options(fastpe_cuda PRIVATE -Wl,--no-as-needed "${FASTPE_TORCH_LIBRARY}")
  set_target_properties(fastpe_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CUDA)
  install(TARGETS fastpe_cuda LIBRARY DESTINATION fastpe)

  # One function to run a conformance kernel on the GPU, for tests/cuda.
  add_library(fastpe_conformance SHARED EXCLUDE_FROM_ALL tests/cuda/conformance.cu)
  target_include_directories(fastpe_conformance PRIVATE csrc)
  target_compile_options(fastpe_conformance PRIVATE --expt-relaxed-constexpr)
endif()
list(JOIN FASTPE_CUDA_BUILT " " FASTPE_CUDA_BUILT)

# ---- for the emulator -----------------------------------------------------------------------------------------------

if(FASTPE_EMU)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    message(FATAL_ERROR "FASTPE_EMU=ON: the emulator runs on x86-64 only, this is ${CMAKE_SYSTEM_PROCESSOR}")
  endif()
  find_package(Threads REQUIRED)

  add_library(fastpe_emu SHARED csrc/emu/emu.cpp csrc/emu/sm90.cpp)
  target_link_libraries(fastpe_emu PRIVATE fastpe_options PUBLIC Threads::Threads)
  # Threads switch stacks behind the compiler's back but never change the OS thread.
  target_compile_options(fastpe_emu PRIVATE -fvisibility=default -ftls-model=initial-exec)

  pybind11_add_module(fastpe_emu_tests MODULE NO_EXTRAS tests/emu/module.cpp)
  # Kernels are switched between, not run fast: -O1 compiles them in half the time.
  target_compile_options(fastpe_emu_tests PRIVATE -O1 -Wno-psabi)
  target_link_libraries(fastpe_emu_tests PRIVATE fastpe_options fastpe_emu)

  # The kernels themselves, through the same launch code, as torch.ops.fastpe_emu.
  set_source_files_properties(${FASTPE_CUDA_SOURCES} PROPERTIES LANGUAGE CXX)
  add_library(fastpe_emu_ops SHARED csrc/emu/ops_emu.cpp ${FASTPE_CUDA_SOURCES})
  target_compile_definitions(fastpe_emu_ops PRIVATE TORCH_TARGET_VERSION=0x020a000000000000ULL)
  # Small waves, so that small calls have several.
  set_source_files_properties(csrc/cuda/cope.cu PROPERTIES COMPILE_DEFINITIONS FASTPE_COPE_WAVE_BYTES=32768)
  target_include_directories(fastpe_emu_ops SYSTEM PRIVATE "${FASTPE_TORCH_DIR}/include")
  target_compile_options(fastpe_emu_ops PRIVATE -O1)
  target_link_libraries(fastpe_emu_ops PRIVATE fastpe_options fastpe_emu "${FASTPE_TORCH_LIBRARY}" "${FASTPE_TORCH_CPU_LIBRARY}")
  target_link_options(fastpe_emu_ops PRIVATE -Wl,--no-undefined -Wl,--as-needed)

  set_target_properties(fastpe_emu fastpe_emu_tests fastpe_emu_ops PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/emu" BUILD_RPATH "$ORIGIN;${FASTPE_TORCH_DIR}/lib" BUILD_WITH_INSTALL_RPATH OFF)
endif()
