// Where encoders begin: types, what the machine does, and how numbers are shared out.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

enum { F32 = 1, F16 = 2, BF16 = 3 };
enum { NOT_FINITE = 1, OVERFLOWS = 2 };

#ifndef RAREFY_EMULATED
#include "machine.cuh"
#endif

shared_memory(pool);

constexpr int MINE = 32, LEVELS = 1 << BITS;  // numbers of a thread
