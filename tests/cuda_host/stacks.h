// Changing from one stack to another, for fibers.cpp: a call that returns when somebody comes back.
// In place, without a call or a system call, since warp operations do little else.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace cuda_host {

#if defined(__x86_64__) || defined(__aarch64__)

// Where a stack was left.
struct Place {
  void* code;
  void* stack;
  void* frame;
};

// At the first turn `code` is called, which never returns.
inline void begin(Place& place, char* stack, size_t bytes, void (*code)()) {
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16;
#ifdef __x86_64__
  const uintptr_t called = sizeof(void*);  // as if a return address had been pushed
#else
  const uintptr_t called = 0;
#endif
  place = {reinterpret_cast<void*>(code), reinterpret_cast<void*>(top - called), nullptr};
}

// What the compiler keeps in registers it saves itself, since all of them are said to change.
[[gnu::always_inline]] inline void go_on(Place& from, Place& to) {
#ifdef __x86_64__
  Place *a = &from, *b = &to;
  asm volatile(
      "leaq 1f(%%rip), %%rax\n"
      "movq %%rax, (%%rdi)\n"
      "movq %%rsp, 8(%%rdi)\n"
      "movq %%rbp, 16(%%rdi)\n"
      "movq 8(%%rsi), %%rsp\n"
      "movq 16(%%rsi), %%rbp\n"
      "jmpq *(%%rsi)\n"
      "1:\n"
      : "+D"(a), "+S"(b)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",
        "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
        "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
#else
  register Place* a asm("x0") = &from;
  register Place* b asm("x1") = &to;
  asm volatile(
      "adr x2, 1f\n"
      "mov x3, sp\n"
      "stp x2, x3, [x0]\n"
      "str x29, [x0, 16]\n"
      "ldp x2, x3, [x1]\n"
      "ldr x29, [x1, 16]\n"
      "mov sp, x3\n"
      "br x2\n"
      "1:\n"
      : "+r"(a), "+r"(b)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15",
        "x16", "x17", "x18", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28",
        "x30", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12",
        "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25",
        "v26", "v27", "v28", "v29", "v30", "v31", "cc", "memory");
#endif
}

#else  // slower by far

using Place = ucontext_t;

inline void begin(Place& place, char* stack, size_t bytes, void (*code)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = stack;
  place.uc_stack.ss_size = bytes;
  place.uc_link = nullptr;
  makecontext(&place, code, 0);
}

inline void go_on(Place& from, Place& to) { swapcontext(&from, &to); }

#endif

}  // namespace cuda_host
