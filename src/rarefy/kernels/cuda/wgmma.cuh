// Products of four warps at once (wgmma, compute capability 9.0): a warp's own 16 rows from registers times tokens from
// shared memory.

#include "bulk.cuh"

// ---- Turns of two fours of warps: who takes one waits until the other has passed it on.

device void take_turn(int four) { asm volatile("bar.sync %0, 256;" ::"r"(1 + four) : "memory"); }
device void pass_turn(int four) { asm volatile("bar.arrive %0, 256;" ::"r"(2 - four) : "memory"); }

// ---- Barriers of a four of warps, and of two.

device void barrier_of_four(int four) { asm volatile("bar.sync %0, 128;" ::"r"(3 + four) : "memory"); }
device void barrier_of_both() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// ---- Registers: four warps that only bring things leave theirs to `warps` that multiply.

template <int WARPS> device void give_registers_back() {
  if constexpr (WARPS == 8 && OUTLIERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
  else if constexpr (WARPS == 8) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
  else if constexpr (WARPS == 12) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
}
template <int WARPS> device void take_registers() {
  if constexpr (WARPS == 8 && OUTLIERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
  else if constexpr (WARPS == 8) asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  else if constexpr (WARPS == 12) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
}

// ---- Products. Between begin and the wait nobody touches the registers of either operand.

device void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
device void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> device void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
device void settle(float& value) { asm volatile("" : "+f"(value)::"memory"); }
device void settle(u32& word) { asm volatile("" : "+r"(word)::"memory"); }

#define D_1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define D_2(n) D_1(n), D_1(n + 1)
#define D_4(n) D_2(n), D_2(n + 2)
#define D_8(n) D_4(n), D_4(n + 4)
#define D_16(n) D_8(n), D_8(n + 8)
#define D_24(n) D_16(n), D_8(n + 16)
#define D_32(n) D_16(n), D_16(n + 16)
#define NAMES_1 "%0, %1, %2, %3"
#define NAMES_2 NAMES_1 \
  ", %4, %5, %6, %7"
#define NAMES_4 NAMES_2 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_8 NAMES_4 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_16 NAMES_8 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_24 NAMES_16 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_32 NAMES_24 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PRODUCT(COUNT, WIDTH, TYPE, A0, A1, A2, A3, TOKENS_, ADD)                                                      \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" ADD ", 0;\n"                                                         \
               "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT                   \
               "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" TOKENS_ ", p, 1, 1, 0; }"                                  \
               : D_##COUNT(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(int(add)))
#define PRODUCTS(COUNT, WIDTH, ...)                                                                \
  device void multiply_some(float (&d)[COUNT][4], const u32 (&a)[4], u64 tokens, bool add) {       \
    if constexpr (HALF) PRODUCT(COUNT, WIDTH, "f16", __VA_ARGS__);                                 \
    else PRODUCT(COUNT, WIDTH, "bf16", __VA_ARGS__);                                               \
  }
PRODUCTS(1, "8", "4", "5", "6", "7", "8", "9")
PRODUCTS(2, "16", "8", "9", "10", "11", "12", "13")
PRODUCTS(4, "32", "16", "17", "18", "19", "20", "21")
PRODUCTS(8, "64", "32", "33", "34", "35", "36", "37")
PRODUCTS(16, "128", "64", "65", "66", "67", "68", "69")
PRODUCTS(32, "256", "128", "129", "130", "131", "132", "133")

// d [+]= a times 16 columns of 8 * N tokens: pieces of 8 tokens x 16 bytes, 128 bytes apart along tokens and `leading`
// along columns.
template <int N, int FIRST = 0> device void multiply_wide(float (&d)[N][4], const u32 (&a)[4], u64 tokens, bool add) {
  if constexpr (FIRST < N) {
    constexpr int LEFT = N - FIRST;
    constexpr int NOW = LEFT >= 32 ? 32 : LEFT >= 16 ? 16 : LEFT >= 8 ? 8 : LEFT >= 4 ? 4 : LEFT >= 2 ? 2 : 1;
    multiply_some(reinterpret_cast<float(&)[NOW][4]>(d[FIRST]), a, tokens + FIRST * 8, add);
    multiply_wide<N, FIRST + NOW>(d, a, tokens, add);
  }
}
// What a product is told of 16 columns of tokens at `block`.
device u64 tokens_at(const u8* block, u32 leading) {
  return u64(shared_address(block) >> 4 & 0x3FFF) | u64(leading >> 4) << 16 | u64(128 >> 4) << 32;
}

// ---- Products of two operands in shared memory, lines of 64 numbers swizzled as copies of boxes are (bulk.cuh).

#define PRODUCT_OF_LINES(COUNT, WIDTH, TYPE, WEIGHTS_, TOKENS_, ADD)                                                   \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" ADD ", 0;\n"                                                         \
               "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT                   \
               "}, %" WEIGHTS_ ", %" TOKENS_ ", p, 1, 1, 0, 0; }"                                                      \
               : D_##COUNT(0) : "l"(weights), "l"(tokens), "r"(int(add)))
#define PRODUCTS_OF_LINES(COUNT, WIDTH, ...)                                                                           \
  device void multiply_lines(float (&d)[COUNT][4], u64 weights, u64 tokens, bool add) {                                \
    if constexpr (HALF) PRODUCT_OF_LINES(COUNT, WIDTH, "f16", __VA_ARGS__);                                            \
    else PRODUCT_OF_LINES(COUNT, WIDTH, "bf16", __VA_ARGS__);                                                          \
  }
// d [+]= 64 rows times 16 columns of 8 * COUNT tokens.
PRODUCTS_OF_LINES(8, "64", "32", "33", "34")
PRODUCTS_OF_LINES(16, "128", "64", "65", "66")
PRODUCTS_OF_LINES(24, "192", "96", "97", "98")
PRODUCTS_OF_LINES(32, "256", "128", "129", "130")
// What a product is told of lines at `block`, whole kilobytes; 32 bytes further lie 2 further.
device u64 lines_at(u32 block) {
  return u64(block >> 4 & 0x3FFF) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
