// Single values that are added to a weight in code. Of each row the first ones lie in quads beside those of the other
// rows of its tile, zeros where a row has fewer, so that where they lie is known before anything is read; the rest of
// long rows follows in compressed sparse rows (layout.py). An entry is a 16-bit value above its column.

device float value_of(u32 entry) { return OUTLIERS == F16 ? half_value(u16(entry >> 16)) : as_float(entry & 0xFFFF0000u); }

// The entries 4 * quad + t of rows g and g + 8, in lane 4 * g + t.
device uint2 entries_of(const Arguments& a, i64 tile, int quad, int lane) {
  uint2 none = {0, 0};
  return quad < a.quads ? load_weights(a.entries + (tile * a.quads + quad) * 32 + lane) : none;
}

// Those entries of rows g and g + 8 that a lane of several adds: all of the quad's, or where blocks are beside each other
// the half or the quarter that is its own. Of the next entry, row g and row g + 8.
struct Quad { u32 at[8 / BESIDE]; };

device Quad quad_of(const Arguments& a, i64 tile, int quad, int lane) {
  Quad found = {};
  if (quad >= a.quads) return found;
  const uint2* from = a.entries + (tile * a.quads + quad) * 32 + lane / 4 * 4 + lane % 4 * BESIDE / 4 * (4 / BESIDE);
#pragma unroll
  for (int n = 0; n < 4 / BESIDE; n += 2) {
    if constexpr (BESIDE == 4) {
      const uint2 own = load_once(from);
      found.at[0] = own.x, found.at[1] = own.y;
    } else {
      const uint4 own = load_once(reinterpret_cast<const uint4*>(from + n));
      found.at[2 * n] = own.x, found.at[2 * n + 1] = own.y, found.at[2 * n + 2] = own.z, found.at[2 * n + 3] = own.w;
    }
  }
  return found;
}

// Where the rest of a row begins and ends; nearly always nowhere.
struct Rest { u32 begin, end; };

device Rest rest_of(const Arguments& a, int row) {
  if (a.rest_ptr == nullptr || row >= a.rows) return {0, 0};
  return {load_near(a.rest_ptr + row), load_near(a.rest_ptr + row + 1)};
}
