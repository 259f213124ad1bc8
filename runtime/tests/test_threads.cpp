// Eight threads on one session, every call of another shape: on the real ONNX Runtime, and under ThreadSanitizer on an
// instrumented one (fake_ort.cpp), which BCA_ORT_LIBRARY names.
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <thread>

#include "support.hpp"

namespace {

constexpr int kThreads = 8, kCalls = 1000, kShapes = 40;

std::size_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  std::size_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

struct Expected {
  support::Pair pair;
  bca::Outputs outputs;
};

std::vector<Expected> make_expected(const bca::Session& session) {
  std::vector<Expected> all;
  for (int i = 0; i < kShapes; ++i) {
    support::Pair pair(1 + i % 4, 1 + i * 7 % 16, 1 + i * 5 % 16, static_cast<unsigned>(i));
    bca::Outputs outputs = session.run(pair.inputs());
    all.push_back({std::move(pair), std::move(outputs)});
  }
  return all;
}

/// Returns how many results were not the expected ones.
int call_from_all_threads(const bca::Session& session, const std::vector<Expected>& all, int calls) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < calls; ++i) {
        const Expected& wanted = all[static_cast<std::size_t>(t * 11 + i) % all.size()];
        const bca::Outputs got = session.run(wanted.pair.inputs());
        for (const auto& [name, tensor] : wanted.outputs) wrong += !support::near(got.at(name), tensor);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return wrong;
}

TEST(Threads, EightTimesAThousandCallsAreRightAndMemoryStaysFlat) {
  bca::Options options;
  options.threads = 1;
  const bca::Session session = bca::Session::open(support::kFixture, options);
  const std::vector<Expected> all = make_expected(session);
  EXPECT_EQ(call_from_all_threads(session, all, kCalls / 4), 0);  // every thread's memory and the arena are made now
  // A leak of 512 bytes a call would be 4 MB in every round; the allocator and the kernel, with huge pages, take more now and
  // then. Sanitizers hold freed memory back on purpose.
  double least = 1e9;
  for (int round = 0; round < (BCA_SANITIZED ? 1 : 3); ++round) {
    const std::size_t before = resident_bytes();
    EXPECT_EQ(call_from_all_threads(session, all, kCalls), 0);
    least = std::min(least, static_cast<double>(resident_bytes()) - static_cast<double>(before));
  }
  if (!BCA_SANITIZED) {
    EXPECT_LT(least, 4e6);
  }
}

TEST(Threads, SessionsOpenAndCloseSideBySide) {
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 15; ++i) bca::Session::open(support::kFixture).run(support::Pair(1, 2, 2, t).inputs());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
