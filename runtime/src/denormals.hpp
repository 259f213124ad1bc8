// Denormal numbers count as zero on the calling thread while a Flushed lives; masked keys make such numbers, and some
// processors multiply them at a hundredth of their speed. x86-64: MXCSR, FTZ bit 15 and DAZ bit 6 (Intel SDM volume 1,
// 10.2.3). 64-bit Arm: FPCR, FZ bit 24 (Arm ARM). Other processors: nothing happens.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace bca {

class Flushed {
 public:
#if defined(__x86_64__)
  Flushed() : before_(_mm_getcsr()) { _mm_setcsr(static_cast<unsigned>(before_) | 1u << 15 | 1u << 6); }
  ~Flushed() { _mm_setcsr(static_cast<unsigned>(before_)); }
#elif defined(__aarch64__)
  Flushed() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ | 1u << 24);
  }
  ~Flushed() { set(before_); }
#endif
  Flushed(const Flushed&) = delete;
  Flushed& operator=(const Flushed&) = delete;

 private:
#if defined(__aarch64__)
  static void set(std::uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#endif
  std::uint64_t before_ = 0;
};

}  // namespace bca
