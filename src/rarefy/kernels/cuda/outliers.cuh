// Single values that are added to a weight in code. Of each row the first ones lie in quads beside those of the other
// rows of its tile, zeros where a row has fewer, so that where they lie is known before anything is read; the rest of
// long rows follows in compressed sparse rows (layout.py). An entry is a 16-bit value above its column.

device float value_of(u32 entry) { return OUTLIERS == F16 ? half_value(u16(entry >> 16)) : as_float(entry & 0xFFFF0000u); }

// The entries 4 * quad + t of rows g and g + 8, in lane 4 * g + t.
device uint2 entries_of(const Arguments& a, i64 tile, int quad, int lane) {
  uint2 none = {0, 0};
  return quad < a.quads ? load_once(a.entries + (tile * a.quads + quad) * 32 + lane) : none;
}

// All of a quad's entries of those rows, in each of the four lanes: of the next entry, rows g and g + 8.
struct Quad { u32 at[8]; };

device Quad quad_of(const Arguments& a, i64 tile, int quad, int lane) {
  Quad found = {};
  if (quad < a.quads) {
    const uint4* from = reinterpret_cast<const uint4*>(a.entries + (tile * a.quads + quad) * 32 + (lane & ~3));
    const uint4 first = load_once(from), second = load_once(from + 1);
    found = {{first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w}};
  }
  return found;
}

// Where the rest of a row begins and ends; nearly always nowhere.
struct Rest { u32 begin, end; };

device Rest rest_of(const Arguments& a, int row) {
  if (a.rest_ptr == nullptr || row >= a.rows) return {0, 0};
  return {load_near(a.rest_ptr + row), load_near(a.rest_ptr + row + 1)};
}
