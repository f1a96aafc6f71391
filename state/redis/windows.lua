-- Entity windows, server side. One string key holds one entity; every function touches that one key (or the marker), so
-- they work on a cluster. The rules are those of windows.py; what is decided here is decided there in the same words.
--
-- The value of an entity's key, little endian, without padding. Version and epoch stand first in every format:
--   header      version 1, epoch 6, next number 5, trimmed 5, kept 4, live 2, sources 2, size of the tally 2, count of
--               fingerprints 1
--   sources     of each source: id 6, highest applied offset 6 and index 3, committed offset 6
--   displaced   of each displaced entry, in order: the number that displaced it, 5
--   heads       of each entry kept, in order, displaced first, and of these repeats: number 5, time 6, place of the source
--               2, offset 6, index 3, levels that it raised 8 (see rolling_counts.py), which partners are there 1 (flags as
--               in ACT, and REPEAT), partners 5
--   vectors     of each entry kept, in the same order: fp16 x d
--   fingerprints  of the last entries applied that have one and are no repeats: 4 each
--   tally       sums of the last two hours and of the day: bits 2, events 4, failures 4, bytes 6, bitmap of partners 32;
--               buckets, by hour: hour 4, events 4, failures 4, bytes 6, bitmap 32

local VERSION = FORMAT -- of formats.py
local HEADER, HEADER_SIZE = '<I1I6I5I5I4I2I2I2I1', 28
local SOURCE, SOURCE_SIZE = '<I6I6I3I6', 21
local HEAD, HEAD_SIZE = '<I5I6I2I6I3c8c1c5', 36
local ENTRY, ENTRY_SIZE = '<I6I6I6I3I6', 43 -- and what it adds to the counts, and its fingerprint:
local ACT, ACT_AT = '<I1I6BBBBB', 27 -- flags (counted, failed, which partners are there), bytes, partners
local PRINT_AT, PRINT_SIZE, UNKNOWN, REMEMBERED, REPEAT = 39, 4, '\0\0\0\0', 32, 128
local BUCKET, BUCKET_SIZE = '<I4I4I4I6I4I4I4I4I4I4I4I4', 50
local SUMS, SUMS_SIZE = '<I2I4I4I6I4I4I4I4I4I4I4I4', 48
local HOUR_MS, HOURS, NEAR, PLACES, MOST_BYTES = 3600000, 24, 2, 256, 2 ^ 47 - 1
local NOTHING = '\0\0\0\0\0\0\0\0'

-- The records of `block`, of `size` bytes each, that `order` names, in that order: consecutive ones in one piece.
local function assemble(block, size, order, ascending)
  local parts, from, count = {}, 1, #order
  if ascending and order[count] - order[1] == count - 1 then
    return string.sub(block, (order[1] - 1) * size + 1, order[count] * size)
  end
  while from <= count do
    local to, first = from, order[from]
    while to < count and order[to + 1] == first + to + 1 - from do to = to + 1 end
    parts[#parts + 1] = string.sub(block, (first - 1) * size + 1, (first + to - from) * size)
    from = to + 1
  end
  return table.concat(parts)
end

-- Whether `prints` has this fingerprint: what begins within one and ends within the next is another.
local function has(prints, fingerprint)
  local at = string.find(prints, fingerprint, 1, true)
  while at and at % PRINT_SIZE ~= 1 do at = string.find(prints, fingerprint, at + 1, true) end
  return at ~= nil
end

local function level(count)
  return math.min(math.floor(6 * math.log(1 + count) / math.log(2) + 1e-9), 255)
end

local function bits_of(word)
  local count = 0
  while word ~= 0 do
    word = bit.band(word, word - 1)
    count = count + 1
  end
  return count
end

local function estimate(places)
  return level(-PLACES * math.log(1 - math.min(places, PLACES - 0.5) / PLACES))
end

-- Add to the sums of a span, and return the levels that this lifted, in the order of rolling_counts.py's COUNTS.
local function lift(sums, failed, bytes, places)
  local events, failures, partners, data = level(sums[2] + 1), 0, 0, 0
  if events == level(sums[2]) then events = 0 end
  sums[2] = sums[2] + 1
  if failed > 0 then
    failures = level(sums[3] + 1)
    if failures == level(sums[3]) then failures = 0 end
    sums[3] = sums[3] + 1
  end
  if bytes > 0 then
    data = level(sums[4] + bytes)
    if data == level(sums[4]) then data = 0 end
    sums[4] = math.min(sums[4] + bytes, MOST_BYTES)
  end
  local used = sums[1]
  for _, place in ipairs(places) do
    local word, mask = 5 + math.floor(place / 32), bit.lshift(1, place % 32)
    if bit.band(sums[word], mask) == 0 then
      sums[word] = bit.bor(sums[word], mask)
      sums[1] = sums[1] + 1
    end
  end
  if sums[1] > used then
    partners = estimate(sums[1])
    if partners == estimate(used) then partners = 0 end
  end
  return events, failures, partners, data
end

local function packed_words(layout, row)
  for word = 5, 12 do row[word] = row[word] % 4294967296 end -- `bit` gives signed words
  return struct.pack(layout, unpack(row, 1, 12))
end

-- The counts of one entity, as rolling_counts.py has them: the sums of both spans are kept beside the buckets, so that those are
-- looked into only when the hour changes. A bucket is {hour, events, failures, bytes, 8 words of the bitmap}; sums are
-- the same with the number of bits instead of the hour. `earlier` are the packed buckets before the newest.
local function tally_of(packed)
  local near, day, earlier, newest = nil, nil, '', nil
  if packed ~= '' then
    near, day = { struct.unpack(SUMS, packed, 1) }, { struct.unpack(SUMS, packed, SUMS_SIZE + 1) }
    newest = { struct.unpack(BUCKET, packed, #packed - BUCKET_SIZE + 1) }
    earlier = string.sub(packed, 2 * SUMS_SIZE + 1, -BUCKET_SIZE - 1)
  end

  local function sum(from)
    local sums = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
    for at = 1, #earlier, BUCKET_SIZE do
      local bucket = { struct.unpack(BUCKET, earlier, at) }
      if bucket[1] >= from then
        for i = 2, 4 do sums[i] = sums[i] + bucket[i] end
        for word = 5, 12 do sums[word] = bit.bor(sums[word], bucket[word]) end
      end
    end
    for word = 5, 12 do sums[1] = sums[1] + bits_of(sums[word]) end
    sums[4] = math.min(sums[4], MOST_BYTES)
    return sums
  end

  local function begin(hour)
    if newest then earlier = earlier .. packed_words(BUCKET, newest) end
    local from = 1
    while from <= #earlier and struct.unpack('<I4', earlier, from) <= hour - HOURS do from = from + BUCKET_SIZE end
    earlier = string.sub(earlier, from)
    near, day = sum(hour - NEAR + 1), sum(hour - HOURS + 1)
    newest = { hour, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
  end

  local function count(bucket, failed, bytes, places)
    bytes = math.min(bytes, MOST_BYTES - bucket[4])
    bucket[2], bucket[3], bucket[4] = bucket[2] + 1, bucket[3] + failed, bucket[4] + bytes
    for _, place in ipairs(places) do
      local word = 5 + math.floor(place / 32)
      bucket[word] = bit.bor(bucket[word], bit.lshift(1, place % 32))
    end
    return bytes
  end

  local function count_earlier(hour, failed, bytes, places)
    local at = 1
    while at <= #earlier and struct.unpack('<I4', earlier, at) < hour do at = at + BUCKET_SIZE end
    local bucket, rest = { hour, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, at
    if at <= #earlier and struct.unpack('<I4', earlier, at) == hour then
      bucket, rest = { struct.unpack(BUCKET, earlier, at) }, at + BUCKET_SIZE
    end
    bytes = count(bucket, failed, bytes, places)
    earlier = string.sub(earlier, 1, at - 1) .. packed_words(BUCKET, bucket) .. string.sub(earlier, rest)
    return bytes
  end

  local function add(time, flags, bytes, ...)
    local hour, failed, places = math.floor(time / HOUR_MS), bit.band(flags, 2) / 2, {}
    for i = 1, 5 do
      if bit.band(flags, bit.lshift(2, i)) ~= 0 then places[#places + 1] = select(i, ...) end
    end
    if not newest or hour > newest[1] then begin(hour) end
    if hour <= newest[1] - HOURS then return NOTHING end
    if hour == newest[1] then
      bytes = count(newest, failed, bytes, places)
    else
      bytes = count_earlier(hour, failed, bytes, places)
    end
    local n, f, p, b = 0, 0, 0, 0
    if hour > newest[1] - NEAR then n, f, p, b = lift(near, failed, bytes, places) end
    local n24, f24, p24, b24 = lift(day, failed, bytes, places)
    return string.char(n, n24, f, f24, p, p24, b, b24)
  end

  local function pack()
    return packed_words(SUMS, near) .. packed_words(SUMS, day) .. earlier .. packed_words(BUCKET, newest)
  end
  return { add = add, packed = pack }
end

-- Append entries to one entity. args: parameters; (source id, committed offset) pairs known beyond those of the
-- entries; entries (source id, time, offset, index, committed offset of the source, what it adds to the counts,
-- fingerprint); their vectors.
-- Returns the number of each entry (5 bytes each, 0: applied before and forgotten since) and the value of the key; or
-- the version alone of a value of this epoch that has another one.
local function push(keys, args)
  local pack, unpack, sub = struct.pack, struct.unpack, string.sub -- libraries are there in a call, not at load
  local key, entries = keys[1], args[3]
  local epoch, width, stride, age, ttl, max_slack, refill = unpack('<I6I2I2I6I6I4I1', args[1])
  local state = redis.call('GET', key) or ''
  local next_number, trimmed, kept, live, sources, tail, printed = 1, 0, 0, 0, 0, 0, 0
  if state ~= '' then
    local version, of = unpack('<I1I6', state)
    if of > epoch then
      return { '', '' } -- begun anew by another consumer, as the marker will tell
    elseif of < epoch then -- what an earlier epoch left has gaps nobody knows: it counts as empty
      state = ''
    elseif version ~= VERSION then
      return { version }
    else
      version, of, next_number, trimmed, kept, live, sources, tail, printed = unpack(HEADER, state)
    end
  end

  local ids, place, applied, applied_index, committed = {}, {}, {}, {}, {}
  local at = HEADER_SIZE + 1
  for s = 1, sources do
    ids[s], applied[s], applied_index[s], committed[s], at = unpack(SOURCE, state, at)
    place[ids[s]] = s
  end
  local changed = false
  local function commit(id, offset)
    local s = place[id]
    if s and offset > committed[s] then committed[s] = offset end
  end
  for from = 1, #args[2], 12 do commit(unpack('<I6I6', args[2], from)) end
  local count = #entries / ENTRY_SIZE
  for i = 1, count do
    local id, _, _, _, offset = unpack(ENTRY, entries, (i - 1) * ENTRY_SIZE + 1)
    commit(id, offset)
  end

  -- An entry is referred to by its position: 1..kept as they stand in the key, kept + i for the i-th of this call.
  local slack, order, displaced, fresh = kept - live, {}, {}, {}
  local heads_at = at + slack * 5
  local vectors_at = heads_at + kept * HEAD_SIZE
  local function head(ref)
    if ref > kept then return unpack(HEAD, fresh[ref - kept]) end
    return unpack(HEAD, state, heads_at + (ref - 1) * HEAD_SIZE)
  end

  -- Forget displaced entries that no redelivery can ask for: those displaced by the oldest uncommitted entry or before.
  if slack > 0 then
    local floor, flying = next_number, false
    for s = 1, sources do flying = flying or applied[s] >= committed[s] end
    if flying then
      for ref = 1, kept do
        local number, _, s, offset = head(ref)
        if number < floor and offset >= committed[s] then floor = number end
      end
    end
    for ref = 1, slack do displaced[ref] = unpack('<I5', state, at + (ref - 1) * 5) end
    if slack > max_slack then
      local sorted = {}
      for ref = 1, slack do sorted[ref] = displaced[ref] end
      table.sort(sorted)
      floor = math.max(floor, sorted[slack - max_slack])
    end
    for ref = 1, slack do
      if displaced[ref] > floor then
        order[#order + 1] = ref
      else
        trimmed = math.max(trimmed, displaced[ref])
        changed = true
      end
    end
  end
  local first = #order + 1 -- where the window begins in `order`
  for ref = slack + 1, kept do order[#order + 1] = ref end
  local repeats = 0 -- which stand first in `order`, and nowhere in that of time
  while repeats < first - 1 do
    local _, _, _, _, _, _, flags = head(order[repeats + 1])
    if string.byte(flags) < REPEAT then break end
    repeats = repeats + 1
  end
  local prints_at = vectors_at + kept * stride
  local prints = sub(state, prints_at, prints_at + printed * PRINT_SIZE - 1)

  local function before(ref, time, id, offset, index)
    local _, t, s, o, n = head(ref)
    if t ~= time then return t < time end
    if ids[s] ~= id then return ids[s] < id end
    if o ~= offset then return o < offset end
    return n < index
  end

  local known -- number by coordinates, made when the first redelivery asks
  local function number_of(s, offset, index)
    if not known then
      known = {}
      for _, ref in ipairs(order) do
        local number, _, at_s, at_offset, at_index = head(ref)
        known[at_s .. ':' .. at_offset .. ':' .. at_index] = number
      end
    end
    return known[s .. ':' .. offset .. ':' .. index]
  end

  local numbers, ascending, unused, tally = {}, true, string.rep('\0', HEAD_SIZE), nil
  for i = 1, count do
    local id, time, offset, index = unpack(ENTRY, entries, (i - 1) * ENTRY_SIZE + 1)
    local s = place[id]
    local seen = s and (offset < applied[s] or (offset == applied[s] and index <= applied_index[s]))
    local number = seen and number_of(s, offset, index) or nil
    fresh[i] = unused
    if not seen or (refill == 1 and not number) then
      changed = true
      number, next_number = next_number, next_number + 1
      if not s then
        sources = sources + 1
        s = sources
        local _, _, _, _, done = unpack(ENTRY, entries, (i - 1) * ENTRY_SIZE + 1)
        ids[s], committed[s], place[id] = id, done, s
      end
      if not seen then applied[s], applied_index[s] = offset, index end
      local ref, levels = kept + i, NOTHING
      local print_at = (i - 1) * ENTRY_SIZE + PRINT_AT + 1
      local fingerprint = sub(entries, print_at, print_at + PRINT_SIZE - 1)
      local again = fingerprint ~= UNKNOWN and has(prints, fingerprint)
      if not seen and not again and fingerprint ~= UNKNOWN then
        prints = sub(prints .. fingerprint, -PRINT_SIZE * REMEMBERED)
      end
      if not seen and not again and string.byte(entries, (i - 1) * ENTRY_SIZE + ACT_AT + 1) % 2 == 1 then
        tally = tally or tally_of(tail > 0 and sub(state, -tail) or '')
        levels = tally.add(time, unpack(ACT, entries, (i - 1) * ENTRY_SIZE + ACT_AT + 1))
      end
      local act = (i - 1) * ENTRY_SIZE + ACT_AT + 1
      local flags, partners = sub(entries, act, act), sub(entries, act + 7, act + 11)
      if again then flags = string.char(string.byte(flags) + REPEAT) end
      fresh[i] = pack(HEAD, number, time, s, offset, index, levels, flags, partners)
      if known then known[s .. ':' .. offset .. ':' .. index] = number end
      local newest = time
      local low, high = repeats + 1, #order + 1
      if again then
        repeats, high = repeats + 1, low
      elseif high > low then
        local _, t = head(order[high - 1])
        newest = math.max(t, time)
        if before(order[high - 1], time, id, offset, index) then low = high end
      end
      while low < high do
        local middle = math.floor((low + high) / 2)
        if before(order[middle], time, id, offset, index) then low = middle + 1 else high = middle end
      end
      ascending = ascending and low > #order
      table.insert(order, low, ref)
      if again or low < first or (low == first and #order - first >= width) or time < newest - age then
        displaced[ref] = number + 1
        first = first + 1
      end
      while not again and first <= #order do
        local _, oldest = head(order[first])
        if #order - first < width and oldest >= newest - age then break end
        displaced[order[first]] = number
        first = first + 1
      end
    end
    numbers[i] = pack('<I5', number or 0)
  end

  if changed then
    local live_now = #order - first + 1
    local counts = tally and tally.packed() or (tail > 0 and sub(state, -tail) or '')
    local parts = {
      pack(HEADER, VERSION, epoch, next_number, trimmed, #order, live_now, sources, #counts, #prints / PRINT_SIZE),
    }
    for s = 1, sources do parts[#parts + 1] = pack(SOURCE, ids[s], applied[s], applied_index[s], committed[s]) end
    for i = 1, first - 1 do parts[#parts + 1] = pack('<I5', displaced[order[i]]) end
    local heads = sub(state, heads_at, vectors_at - 1) .. table.concat(fresh)
    local vectors = sub(state, vectors_at, vectors_at + kept * stride - 1) .. args[4]
    parts[#parts + 1] = assemble(heads, HEAD_SIZE, order, ascending)
    parts[#parts + 1] = assemble(vectors, stride, order, ascending)
    parts[#parts + 1] = prints
    parts[#parts + 1] = counts
    state = table.concat(parts)
    redis.call('SET', key, state, 'PX', ttl)
  end
  return { table.concat(numbers), state }
end

-- The marker is a hash: epoch; horizon; of each source p|NAME progress, c|NAME committed, r|NAME while it is refilled,
-- t|NAME the number of the topic that it was of first, n|NAME of the topic that it is of now. NAME is the name of a topic;
-- but of p|, c| and r| with # and a number behind it where that is another topic than the first.
local function state_of(key)
  local pending = 0
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if string.sub(field, 1, 2) == 'r|' then pending = pending + 1 end
  end
  return { tonumber(redis.call('HGET', key, 'epoch') or 0), tonumber(redis.call('HGET', key, 'horizon') or 0), pending }
end

local function raise_to(key, field, value)
  if value > tonumber(redis.call('HGET', key, field) or -1) then
    redis.call('HSET', key, field, string.format('%.0f', value))
  end
end

-- Check that the store remembers what it was told, and tell it more. args: epoch, then of each source: name,
-- progress it must have, progress now, committed. Returns epoch, horizon, how many sources are being refilled, how many
-- fell behind.
local function mark(keys, args)
  local key, behind = keys[1], 0
  local state = state_of(key)
  if state[1] ~= tonumber(args[1]) then return state end
  for i = 2, #args, 4 do
    if tonumber(redis.call('HGET', key, 'p|' .. args[i]) or 0) < tonumber(args[i + 1]) then behind = behind + 1 end
  end
  if behind == 0 then
    for i = 2, #args, 4 do
      raise_to(key, 'p|' .. args[i], tonumber(args[i + 2]))
      raise_to(key, 'c|' .. args[i], tonumber(args[i + 3]))
    end
  end
  state[4] = behind
  return state
end

-- Begin to refill sources. args: the epoch that was lost, '1' if nothing of it can be used, names of sources. Of
-- several consumers that notice at once the first begins a new epoch and the others join it; what one of them has
-- refilled already is not waited for again. Returns as `mark`.
local function begin(keys, args)
  local key, lost = keys[1], tonumber(args[1])
  local current = state_of(key)[1]
  if args[2] == '1' and (current == 0 or current == lost) then
    local now = redis.call('TIME')
    local ms = now[1] * 1000 + math.floor(now[2] / 1000)
    for _, field in ipairs(redis.call('HKEYS', key)) do
      local kind = string.sub(field, 1, 2)
      if kind ~= 't|' and kind ~= 'n|' then redis.call('HDEL', key, field) end
    end
    redis.call('HSET', key, 'epoch', string.format('%.0f', math.max(ms, lost + 1)))
  end
  for i = 3, #args do
    if args[2] == '0' or redis.call('HEXISTS', key, 'p|' .. args[i]) == 0 then
      redis.call('HSET', key, 'r|' .. args[i], 1)
    end
  end
  return state_of(key)
end

-- Say in the marker of an earlier format, if there is one, that sources are read by a release of this one from now on:
-- their windows lack these events until they are refilled there. args: names of sources.
local function leave(keys, args)
  if redis.call('HEXISTS', keys[1], 'epoch') == 0 then return 0 end
  for i = 1, #args do redis.call('HSET', keys[1], 'r|' .. args[i], 1) end
  return #args
end

-- End the refilling of sources. args: horizon, names of sources. Returns as `mark`.
local function finish(keys, args)
  for i = 2, #args do redis.call('HDEL', keys[1], 'r|' .. args[i]) end
  raise_to(keys[1], 'horizon', tonumber(args[1]))
  return state_of(keys[1])
end

-- Say which topics sources are of. args: of each its name, and the number of its topic. Returns the number of the topic
-- that each was of first. Nothing of a topic that is gone is delivered again, as if all of it were committed.
local function identify(keys, args)
  local key, all = keys[1], {}
  for i = 1, #args, 2 do
    local name, topic = args[i], args[i + 1]
    redis.call('HSETNX', key, 't|' .. name, topic)
    local first, before = redis.call('HGET', key, 't|' .. name), redis.call('HGET', key, 'n|' .. name)
    redis.call('HSET', key, 'n|' .. name, topic)
    if before and before ~= topic then
      local gone = before == first and name or name .. string.format('#%012x', tonumber(before))
      redis.call('HSET', key, 'c|' .. gone, '140737488355327')
    end
    all[#all + 1] = first
  end
  return all
end

redis.register_function('PREFIX_identify', identify)
redis.register_function('PREFIX_push', push)
redis.register_function('PREFIX_mark', mark)
redis.register_function('PREFIX_begin', begin)
redis.register_function('PREFIX_leave', leave)
redis.register_function('PREFIX_finish', finish)
