"""The kernel of ``decode_attention.py``: all query heads of one KV head over one stretch of tokens in code, or over a
part of a list of blocks of them."""

# Tuples in Triton know addition only, and may grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from rarefy.kernels.triton.tiles import halves, load_chunks, load_entries, load_table, numbers, pointer


@triton.jit
def _is_hidden(position, batch, sinks, first, SINKS: tl.constexpr, PADDED: tl.constexpr):
    """Whether tokens are sinks, which are read elsewhere, or padding."""
    hidden = position < (tl.load(first + batch) if PADDED else 0)
    for number in tl.static_range(SINKS):
        hidden = hidden | (position == tl.load(sinks + batch * SINKS + number))
    return hidden


@triton.jit(
    do_not_specialize=["runs", "run_tokens", "parts", "tiles", "heads", "splits", "rotated", "origin", "capacity"]
)
def attend_stretch(
    query, k_table, k_lut, v_table, v_lut, shifts, sinks, first, k_center, k_spread, k_order, turns, starts,
    part_out, part_lse,
    runs, run_tokens, parts, tiles, heads, splits, rotated, origin, scaling, index, count, capacity,
    GROUP_HEADS: tl.constexpr, PITCH: tl.constexpr, VIRTUAL: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, SINKS: tl.constexpr, PADDED: tl.constexpr, ROPE: tl.constexpr, ORDERED: tl.constexpr,
    NUMBERS: tl.constexpr, PAIRS: tl.constexpr, STAGES: tl.constexpr,
    K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_PER: tl.constexpr, K_BLOCK: tl.constexpr, K_GROUP: tl.constexpr,
    K_SCALE: tl.constexpr, K_OFFSET: tl.constexpr, K_JOINED: tl.constexpr, K_AFFINE: tl.constexpr,
    K_ENTRIES: tl.constexpr, K_INDEX: tl.constexpr, K_RANK: tl.constexpr,
    V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_PER: tl.constexpr, V_BLOCK: tl.constexpr, V_GROUP: tl.constexpr,
    V_OFFSET: tl.constexpr, V_JOINED: tl.constexpr, V_ENTRIES: tl.constexpr, V_INDEX: tl.constexpr,
    V_RANK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    run_tokens = tl.multiple_of(run_tokens, 16)
    run, part = split // parts, split % parts
    batch, head = pair // heads, pair % heads
    k_codes, k_scale, k_zero = tl.load(k_table + run), tl.load(k_table + runs + run), tl.load(k_table + 2 * runs + run)
    v_codes, v_scale, v_zero = tl.load(v_table + run), tl.load(v_table + runs + run), tl.load(v_table + 2 * runs + run)
    k_tokens = tl.multiple_of(tl.load(k_table + 7 * runs + run), 16)  # from one head to the next
    v_tokens = tl.multiple_of(tl.load(v_table + 7 * runs + run), 16)
    SLOTS: tl.constexpr = K_PER if K_KIND == 1 else 1
    N: tl.constexpr = R * SLOTS  # tokens of a tile; token r * SLOTS + slot is row r of a slot
    K_SLOTS: tl.constexpr = (2 if K_BITS == 3 else 1) if K_KIND == 1 else K_PER  # parts of a key by channels
    KX: tl.constexpr = D // K_SLOTS
    K_NEXT: tl.constexpr = 1 if K_KIND == 1 else K_SLOTS  # from one channel of a part to the next
    K_FIRST: tl.constexpr = KX if K_KIND == 1 else 1  # from one part's first channel to the next's
    VX: tl.constexpr = D // V_PER
    K_UNIT: tl.constexpr = 1 << K_BITS if K_KIND != 0 else 1
    V_UNIT: tl.constexpr = 1 << V_BITS if V_KIND != 0 else 1
    K_GROUPS: tl.constexpr = D // K_GROUP
    V_GROUPS: tl.constexpr = D // V_GROUP
    FOLDED: tl.constexpr = K_KIND == 1 and (K_GROUP % N == 0 or VIRTUAL > 1)  # scales go into the query
    V_PARTS: tl.constexpr = V_GROUPS if V_KIND == 2 and V_GROUPS <= 2 else 1  # scales go into as many weights
    DEEP: tl.constexpr = 16
    r, kx, vx = tl.arange(0, R), tl.arange(0, KX), tl.arange(0, VX)
    deep = tl.arange(0, DEEP)
    # A column is a head and, where groups are shorter than a tile, the group of tokens that it sees.
    member, virtual = tl.arange(0, M) % PITCH, tl.arange(0, M) // PITCH
    real = (member < GROUP_HEADS) & (virtual < VIRTUAL)
    unit = scaling * 1.4426950408889634  # scores are in units of log 2
    asked = query + (pair * GROUP_HEADS + member) * D
    q = ()  # float32, by slots
    q16 = ()
    partner = ()
    q_sum = tl.zeros((KX, M), tl.float32)
    for slot in tl.static_range(K_SLOTS):
        own_channel = kx * K_NEXT + slot * K_FIRST
        if ORDERED:
            own_channel = tl.load(k_order + head * D + own_channel).to(tl.int32)
        numbers_of = tl.load(asked[None, :] + own_channel[:, None], mask=real[None, :], other=0.0).to(tl.float32) * unit
        q = q + (numbers_of,)
        q16 = q16 + (numbers_of.to(tl.float16),)
        q_sum += q16[slot].to(tl.float32)
        if ROPE:
            opposite = tl.where(own_channel < rotated, own_channel + rotated, own_channel - rotated)
            has_one = (own_channel < 2 * rotated)[:, None] & real[None, :]
            numbers_of = tl.load(asked[None, :] + opposite[:, None], mask=has_one, other=0.0).to(tl.float32) * unit
            partner = partner + (tl.where((own_channel < rotated)[:, None], numbers_of, -numbers_of),)
    if K_KIND == 4:
        k_lut += head * (D << K_BITS) // 2
    if V_KIND == 4:
        v_lut += head * (D << V_BITS) // 2
    k_entries = load_table(k_lut, K_KIND, K_BITS, PAIRS)
    v_entries = load_table(v_lut, V_KIND, V_BITS, PAIRS)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    lift = (tl.zeros((M,), tl.float32),) * V_PARTS
    mixed = (tl.zeros((VX, M), tl.float32),) * (V_PER * V_PARTS)
    begin, end = part * tiles, min((part + 1) * tiles, run_tokens // N)
    if LISTED:
        listed = tl.load(count + pair) * (LISTED // N)
        each = (listed + splits - 1) // splits
        begin, end = split * each, min((split + 1) * each, listed)
    for step in tl.range(begin, end, num_stages=STAGES):
        tile = step
        if LISTED:
            # A load ahead of the loop may read behind the list's end, where anything may be.
            chosen = tl.load(index + pair * capacity + tl.minimum(step // (LISTED // N), capacity - 1))
            token = chosen * LISTED + step % (LISTED // N) * N
            beyond = (token < 0) | (token >= runs * run_tokens)
            token = tl.where(beyond, 0, token)
            run, tile = token // run_tokens, token % run_tokens // N
            k_codes, v_codes = tl.load(k_table + run), tl.load(v_table + run)
            k_scale, k_zero = tl.load(k_table + runs + run), tl.load(k_table + 2 * runs + run)
            v_scale, v_zero = tl.load(v_table + runs + run), tl.load(v_table + 2 * runs + run)
            k_tokens = tl.multiple_of(tl.load(k_table + 7 * runs + run), 16)
            v_tokens = tl.multiple_of(tl.load(v_table + 7 * runs + run), 16)
        start = tile * N
        # Rows of tensors that lie token by token.
        k_row = (batch if K_JOINED else pair) * k_tokens + start
        v_row = (batch if V_JOINED else pair) * v_tokens + start
        scores = ()
        if K_KIND == 1:
            PER_BLOCK: tl.constexpr = K_BLOCK // K_PER
            GROUPS: tl.constexpr = K_BLOCK // K_GROUP
            block = pair * (k_tokens // K_BLOCK) + start // K_BLOCK
            inside = start % K_BLOCK if K_BLOCK >= N else 0
            for half in tl.static_range(K_SLOTS):
                at = half * KX + kx
                if K_BLOCK >= N:
                    chunk = at[None, :] * PER_BLOCK + r[:, None]
                    group = at[None, :] * GROUPS + (r[:, None] * K_PER) // K_GROUP
                    column = at[:, None] * GROUPS + virtual[None, :]
                else:
                    chunk = (r[:, None] // PER_BLOCK * D + at[None, :]) * PER_BLOCK + r[:, None] % PER_BLOCK
                    token = r[:, None] * K_PER
                    group = (token // K_BLOCK * D + at[None, :]) * GROUPS + token % K_BLOCK // K_GROUP
                    token = virtual[None, :] * K_GROUP
                    column = (token // K_BLOCK * D + at[:, None]) * GROUPS + token % K_BLOCK // K_GROUP
                base = block * D * PER_BLOCK + inside // K_PER
                chunks = load_chunks(k_codes, base, chunk, r[:, None] % 4, shifts, K_BITS, K_PER)
                base = block * D * GROUPS + inside // K_GROUP
                more = ()
                if FOLDED:
                    if VIRTUAL > 1:
                        steps = tl.load(pointer(k_scale, tl.float16) + base + column, mask=real[None, :], other=0.0)
                        zeros = tl.load(pointer(k_zero, tl.float16) + base + column, mask=real[None, :], other=0.0)
                    else:
                        steps = tl.load(pointer(k_scale, tl.float16) + base + at * GROUPS)[:, None]
                        zeros = tl.load(pointer(k_zero, tl.float16) + base + at * GROUPS)[:, None]
                    # Both terms use the query as rounded here, so a large zero does not magnify its rounding.
                    scaled = (q[half] * (steps.to(tl.float32) * K_UNIT)).to(tl.float16)
                    below = tl.sum(scaled.to(tl.float32) * (zeros.to(tl.float32) * (1 / K_UNIT) + 1), 0)[None, :]
                    for slot in tl.static_range(SLOTS):
                        keys = halves(chunks, slot, K_BITS, K_BITS * K_PER, PAIRS)
                        if half == 0:
                            more = more + (tl.dot(keys, scaled) - below,)
                        else:
                            more = more + (tl.dot(keys, scaled, scores[slot]) - below,)
                else:
                    steps = tl.load(pointer(k_scale, tl.float16) + base + group) * K_UNIT
                    zeros = tl.load(pointer(k_zero, tl.float16) + base + group) * (1 / K_UNIT)
                    below = steps + zeros * steps
                    for slot in tl.static_range(SLOTS):
                        keys = halves(chunks, slot, K_BITS, K_BITS * K_PER, PAIRS) * steps - below
                        if half == 0:
                            more = more + (tl.dot(keys, q16[half]),)
                        else:
                            more = more + (tl.dot(keys, q16[half], scores[slot]),)
                scores = more
            if K_ENTRIES > 0:
                # Outliers of channels: a tile that is zero but for them.
                for half in tl.static_range(K_SLOTS):
                    entries = (block * D + half * KX + kx) * K_ENTRIES
                    indices = pointer(tl.load(k_table + 4 * runs + run), K_INDEX) + entries
                    values = pointer(tl.load(k_table + 3 * runs + run), tl.float16) + entries
                    outliers = ()
                    for entry in tl.static_range(K_ENTRIES):
                        at = tl.load(indices + entry).to(tl.int32) - inside
                        outliers = outliers + ((at[None, :], tl.load(values + entry)[None, :]),)
                    more = ()
                    for slot in tl.static_range(SLOTS):
                        extra = tl.zeros((R, KX), tl.float16)
                        for entry in tl.static_range(K_ENTRIES):
                            here = (r * SLOTS + slot)[:, None] == outliers[entry][0]
                            extra += tl.where(here, outliers[entry][1], 0.0)
                        more = more + (tl.dot(extra, q16[half], scores[slot]),)
                    scores = more
        else:
            WIDE: tl.constexpr = KX
            wide = heads * KX if K_JOINED else WIDE  # chunks of a token's row
            place = r[:, None] * wide + kx[None, :]
            base = k_row * wide + (head * KX if K_JOINED else 0)
            if K_KIND == 0:
                chunks = tl.load(pointer(k_codes, NUMBERS) + base + place).to(tl.float16)
            elif K_KIND == 4:
                chunks = ()
                for word in tl.static_range(K_PER // 2):
                    chunks = chunks + (
                        load_entries(k_codes, base, place, kx[None, :], k_lut, word, K_BITS, K_PER),
                    )
            else:
                chunks = load_chunks(k_codes, base, place, kx[None, :] % 4, shifts, K_BITS, K_PER)
            found = tl.zeros((R, M), tl.float32)
            for slot in tl.static_range(K_SLOTS):
                keys = numbers(chunks, k_entries, slot, K_KIND, K_BITS, K_PER, PAIRS)
                if K_KIND == 2 and K_GROUP < D:
                    if slot == 0:
                        group = r[:, None] * K_GROUPS + (kx[None, :] * K_PER) // K_GROUP
                        steps = tl.load(pointer(k_scale, tl.float16) + k_row * K_GROUPS + group) * K_UNIT
                        zeros = tl.load(pointer(k_zero, tl.float16) + k_row * K_GROUPS + group) * (1 / K_UNIT)
                        below = steps + zeros * steps
                    keys = keys * steps - below
                if ROPE:
                    channel = kx * K_SLOTS + slot
                    turning = tl.load(k_order + head * D + channel).to(tl.int32) if ORDERED else channel
                    angle = starts + ((batch * runs + run) * (run_tokens // N) + tile) * 2 * D + turning
                    cosine, sine = tl.load(angle)[:, None], tl.load(angle + D)[:, None]
                    straight = q[slot] * cosine + partner[slot] * sine
                    crossed = partner[slot] * cosine - q[slot] * sine
                    if ORDERED:
                        angles = turns + (turning % K_SLOTS * 2 * R + r[:, None]) * KX + turning // K_SLOTS
                    else:
                        angles = turns + (slot * 2 * R + r[:, None]) * KX + kx[None, :]
                    cosines, sines = tl.load(angles), tl.load(angles + R * KX)
                    if K_AFFINE:
                        center = tl.load(k_center + head * D + channel)[:, None]
                        found = tl.dot(cosines, (straight * center).to(tl.float16), found)
                        found = tl.dot(sines, (crossed * center).to(tl.float16), found)
                        spread = tl.load(k_spread + head * D + channel)[:, None]
                        straight *= spread
                        crossed *= spread
                    found = tl.dot(keys * cosines, straight.to(tl.float16), found)
                    found = tl.dot(keys * sines, crossed.to(tl.float16), found)
                elif K_AFFINE:
                    spread = tl.load(k_spread + head * D + kx * K_SLOTS + slot)[:, None]
                    center = tl.load(k_center + head * D + kx * K_SLOTS + slot)[:, None]
                    found = tl.dot(keys, (q[slot] * spread).to(tl.float16), found)
                    found += tl.sum(q[slot] * center, 0)[None, :]
                else:
                    found = tl.dot(keys, q16[slot], found)
            if K_KIND == 2 and K_GROUP == D:
                steps = tl.load(pointer(k_scale, tl.float16) + k_row + r).to(tl.float32) * K_UNIT
                zeros = tl.load(pointer(k_zero, tl.float16) + k_row + r).to(tl.float32) * (1 / K_UNIT) + 1
                found = (found - tl.sum(q_sum, 0)[None, :] * zeros[:, None]) * steps[:, None]
            if K_KIND == 3 and K_SCALE:
                found *= tl.load(pointer(k_scale, tl.float16) + k_row + r).to(tl.float32)[:, None]
                if K_OFFSET:
                    offsets = tl.load(pointer(k_zero, tl.float16) + k_row + r).to(tl.float32)
                    found += tl.sum(q_sum, 0)[None, :] * offsets[:, None]
            if K_ENTRIES > 0:
                # Outliers of tokens: each meets the query at its own channel.
                entry = tl.arange(0, DEEP)
                entries = (k_row + r)[:, None] * K_ENTRIES + entry[None, :]
                there = (entry < K_ENTRIES)[None, :] & (r >= 0)[:, None]
                indices = pointer(tl.load(k_table + 4 * runs + run), K_INDEX) + entries
                channel = tl.load(indices, mask=there, other=0).to(tl.int32)
                if K_JOINED:
                    channel -= (head * D).to(tl.int32)
                there = there & (channel >= 0) & (channel < D)
                values = pointer(tl.load(k_table + 3 * runs + run), tl.float16) + entries
                value = tl.load(values, mask=there, other=0.0).to(tl.float32)
                seen = there[:, :, None] & real[None, None, :]
                own = tl.load(asked[None, None, :] + channel[:, :, None], mask=seen, other=0.0).to(tl.float32) * unit
                if ROPE:
                    angle = starts + ((batch * runs + run) * (run_tokens // N) + tile) * 2 * D + channel
                    cosine, sine = tl.load(angle, mask=there, other=0.0), tl.load(angle + D, mask=there, other=0.0)
                    angles = turns + (channel % K_SLOTS * 2 * R + r[:, None]) * KX + channel // K_SLOTS
                    inner = tl.load(angles, mask=there, other=0.0).to(tl.float32)
                    inner_sine = tl.load(angles + R * KX, mask=there, other=0.0).to(tl.float32)
                    other = tl.where(channel < rotated, channel + rotated, channel - rotated)[:, :, None]
                    turned = seen & (channel < 2 * rotated)[:, :, None]
                    crossed = tl.load(asked[None, None, :] + other, mask=turned, other=0.0).to(tl.float32) * unit
                    crossed = tl.where((channel < rotated)[:, :, None], crossed, -crossed)
                    own = own * (cosine * inner - sine * inner_sine)[:, :, None]
                    own += crossed * (sine * inner + cosine * inner_sine)[:, :, None]
                found += tl.sum(own * value[:, :, None], 1)
            scores = scores + (found,)
        if K_RANK > 0:
            block = pair * (k_tokens // K_BLOCK) + start // K_BLOCK
            right = pointer(tl.load(k_table + 6 * runs + run), tl.float16) + block * K_RANK * D
            met = tl.zeros((DEEP, M), tl.float32)
            for slot in tl.static_range(K_SLOTS):
                factor = tl.load(right + deep[:, None] * D + (kx * K_NEXT + slot * K_FIRST)[None, :],
                                 mask=(deep < K_RANK)[:, None], other=0.0)  # fmt: skip
                met = tl.dot(factor, q16[slot], met)
            left = pointer(tl.load(k_table + 5 * runs + run), tl.float16) + k_row * K_RANK
            more = ()
            for slot in tl.static_range(SLOTS):
                factor = tl.load(left + (r * SLOTS + slot)[:, None] * K_RANK + deep[None, :],
                                 mask=(deep < K_RANK)[None, :], other=0.0)  # fmt: skip
                more = more + (tl.dot(factor, met.to(tl.float16), scores[slot]),)
            scores = more
        if SINKS > 0 or PADDED or VIRTUAL > 1 or LISTED:
            more = ()
            for slot in tl.static_range(SLOTS):
                position = origin + run * run_tokens + start + r * SLOTS + slot
                hidden = _is_hidden(position, batch, sinks, first, SINKS, PADDED)[:, None]
                if LISTED:
                    hidden = hidden | beyond
                if VIRTUAL > 1:
                    hidden = hidden | ((r * SLOTS // K_GROUP)[:, None] != virtual[None, :])
                more = more + (tl.where(hidden, float("-inf"), scores[slot]),)
            scores = more
        peaks = scores[0]
        for slot in tl.static_range(1, SLOTS):
            peaks = tl.maximum(peaks, scores[slot])
        peak = tl.maximum(top, tl.max(peaks, 0))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        fade = tl.exp2(top - safe)
        top = peak
        faded = ()
        for slot in tl.static_range(V_PER * V_PARTS):
            faded = faded + (mixed[slot] * fade[None, :],)
        shares = tl.zeros((R, M), tl.float32)
        lifts = (tl.zeros((R, M), tl.float32),) * V_PARTS
        ranked = tl.zeros((DEEP, M), tl.float32)
        for slot in tl.static_range(SLOTS):
            share = tl.exp2(scores[slot] - safe[None, :])
            shares += share
            token = r * SLOTS + slot
            weights = share.to(tl.float16)
            if V_ENTRIES > 0 or V_RANK > 0:
                plain = weights
            wide = heads * VX if V_JOINED else VX
            place = token[None, :] * wide + vx[:, None]
            base = v_row * wide + (head * VX if V_JOINED else 0)
            if V_KIND == 0:
                chunks = tl.load(pointer(v_codes, NUMBERS) + base + place).to(tl.float16)
            elif V_KIND == 4:
                chunks = ()
                for word in tl.static_range(V_PER // 2):
                    chunks = chunks + (
                        load_entries(v_codes, base, place, vx[:, None], v_lut, word, V_BITS, V_PER),
                    )
            else:
                chunks = load_chunks(v_codes, base, place, vx[:, None] % 4, shifts, V_BITS, V_PER)
            weighted = (weights,)
            if V_KIND == 2 and V_GROUPS > V_PARTS:
                group = token[None, :] * V_GROUPS + (vx[:, None] * V_PER) // V_GROUP
                steps = tl.load(pointer(v_scale, tl.float16) + v_row * V_GROUPS + group) * V_UNIT
                zeros = tl.load(pointer(v_zero, tl.float16) + v_row * V_GROUPS + group) * (1 / V_UNIT)
                below = steps + zeros * steps
            elif V_KIND == 2:
                weighted = ()
                lower = ()
                for half in tl.static_range(V_PARTS):
                    place = (v_row + token) * V_GROUPS + half
                    steps = tl.load(pointer(v_scale, tl.float16) + place).to(tl.float32) * V_UNIT
                    zeros = tl.load(pointer(v_zero, tl.float16) + place).to(tl.float32) * (1 / V_UNIT) + 1
                    weighted = weighted + ((share * steps[:, None]).to(tl.float16),)
                    lower = lower + (lifts[half] - weighted[half].to(tl.float32) * zeros[:, None],)
                lifts = lower
            elif V_KIND == 3:
                steps = tl.load(pointer(v_scale, tl.float16) + v_row + token).to(tl.float32)
                weighted = ((share * steps[:, None]).to(tl.float16),)
                if V_OFFSET:
                    offsets = tl.load(pointer(v_zero, tl.float16) + v_row + token).to(tl.float32)
                    lifts = (lifts[0] + share * offsets[:, None],)
            outliers = ()
            for entry in tl.static_range(V_ENTRIES):
                entries = (v_row + token) * V_ENTRIES + entry
                at = tl.load(pointer(tl.load(v_table + 4 * runs + run), V_INDEX) + entries).to(tl.int32)
                if V_JOINED:
                    at -= (head * D).to(tl.int32)
                value = tl.load(pointer(tl.load(v_table + 3 * runs + run), tl.float16) + entries)
                outliers = outliers + ((at[None, :], value[None, :]),)
            summed = ()
            for part_of in tl.static_range(V_PER):
                values = numbers(chunks, v_entries, part_of, V_KIND, V_BITS, V_PER, PAIRS)
                if V_KIND == 2 and V_GROUPS > V_PARTS:
                    values = values * steps - below
                if V_ENTRIES > 0:
                    extra = tl.zeros((VX, R), tl.float16)
                    for entry in tl.static_range(V_ENTRIES):
                        here = (vx * V_PER + part_of)[:, None] == outliers[entry][0]
                        extra += tl.where(here, outliers[entry][1], 0.0)
                for half in tl.static_range(V_PARTS):
                    sums = tl.dot(values, weighted[half], faded[part_of * V_PARTS + half])
                    if V_ENTRIES > 0:
                        sums = tl.dot(extra, plain, sums)
                    summed = summed + (sums,)
            faded = summed
            if V_RANK > 0:
                left = pointer(tl.load(v_table + 5 * runs + run), tl.float16) + v_row * V_RANK
                factor = tl.load(left + token[None, :] * V_RANK + deep[:, None],
                                 mask=(deep < V_RANK)[:, None], other=0.0)  # fmt: skip
                ranked = tl.dot(factor, plain, ranked)
        if V_RANK > 0:
            block = pair * (v_tokens // V_BLOCK) + start // V_BLOCK
            right = pointer(tl.load(v_table + 6 * runs + run), tl.float16) + block * V_RANK * D
            summed = ()
            for part_of in tl.static_range(V_PER):
                factor = tl.load(right + deep[None, :] * D + (vx * V_PER + part_of)[:, None],
                                 mask=(deep < V_RANK)[None, :], other=0.0)  # fmt: skip
                for half in tl.static_range(V_PARTS):
                    sums = tl.dot(factor, ranked.to(tl.float16), faded[part_of * V_PARTS + half])
                    summed = summed + (sums,)
            faded = summed
        total = total * fade + tl.sum(shares, 0)
        lower = ()
        for half in tl.static_range(V_PARTS):
            lower = lower + (lift[half] * fade + tl.sum(lifts[half], 0),)
        lift = lower
        mixed = faded
    whole = tl.where(total == 0.0, 1.0, total)
    out = ((pair * GROUP_HEADS + member) * splits + split) * VIRTUAL + virtual
    for slot in tl.static_range(V_PER):
        to = part_out + out[None, :] * D + (vx * V_PER + slot)[:, None]
        sums = mixed[slot * V_PARTS] + lift[0][None, :]
        if V_PARTS > 1:
            here = (vx * V_PER // V_GROUP == 1)[:, None]
            sums = tl.where(here, mixed[slot * V_PARTS + 1] + lift[1][None, :], sums)
        tl.store(to, sums / whole[None, :], mask=real[None, :])
    own = tl.where(total == 0.0, float("-inf"), (top + tl.log2(whole)) * 0.6931471805599453)
    tl.store(part_lse + out, own, mask=real)
