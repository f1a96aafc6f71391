-- Timers, server side: three kinds of key, all with one hash tag. The rules are those of timers.py, in the same words.
-- What changes how a value is packed is another format (formats.py).
--
--   open    hash: entity -> when it is due and its last event (TIMER, then the event)
--   due     of each source, sorted set: entity by a time no later than it is due, which is looked up when it is reached
--   sources hash: id of a source (6 bytes) -> SOURCE; 'told' .. id -> what was told of it and is not committed;
--           'topic' .. id -> number of the topic that it is of

local TIMER, TIMER_SIZE = '<I6I6I6I6I3dI1', 36 -- due, time, source, offset, index, p-value, complete
local SOURCE = '<I6I6I3I6I6I6' -- progress, highest applied offset + 1 (0: none) and index, clock + 1, committed, touched
local STEP = '<I1I2I6I3I6I6dI1' -- kind, place of the source, offset, index, time or clock, quiet, p-value, complete
local TOLD, TOLD_SIZE = '<I6I3I2I4', 15 -- offset, index, bytes of the entity and of the timer, which follow
local TICK, HEARD = 0, 1 -- kinds of step; 2: heard late
local AFTER = 8388608

local function read_sources(key)
  local found, all = {}, redis.call('HGETALL', key)
  for i = 1, #all, 2 do
    if #all[i] == 6 then
      local s = { struct.unpack(SOURCE, all[i + 1]) }
      found[all[i]] = { progress = s[1], offset = s[2] - 1, index = s[3], clock = s[4] - 1, committed = s[5],
        touched = s[6] }
    end
  end
  return found
end

local function write_source(key, id, s)
  redis.call('HSET', key, id, struct.pack(SOURCE, s.progress, s.offset + 1, s.index, s.clock + 1, s.committed, s.touched))
end

local function now_ms()
  local now = redis.call('TIME')
  return now[1] * 1000 + math.floor(now[2] / 1000)
end

-- What is told of a source and not committed, with what is new, as one string; and the part of it at first..last.
local function keep_told(key, id, committed, first, last, fresh)
  local before, kept, asked, changed = redis.call('HGET', key, 'told' .. id) or '', {}, {}, #fresh > 0
  local function keep(record, offset)
    if offset >= first and offset <= last then asked[#asked + 1] = record end
    if offset >= committed then kept[#kept + 1] = record else changed = true end
  end
  local at = 1
  while at <= #before do
    local offset, _, entity, timer = struct.unpack(TOLD, before, at)
    local size = TOLD_SIZE + entity + timer
    keep(string.sub(before, at, at + size - 1), offset)
    at = at + size
  end
  for _, record in ipairs(fresh) do keep(record[1], record[2]) end
  if changed then
    if #kept > 0 then
      redis.call('HSET', key, 'told' .. id, table.concat(kept))
    else
      redis.call('HDEL', key, 'told' .. id)
    end
  end
  return table.concat(asked)
end

-- Take the steps of a batch. keys: open, sources, due of each source of the batch. args: ttl, ms after which a source
-- that does nothing is idle, most open, most open while events are kept, how many sources; of each source its id, the
-- progress that it must have, progress now, committed, first and last offset of the batch; then of each step STEP,
-- entity, event. Returns id and progress of the sources that have less than they must, and what was told, of each
-- source as one string.
local function advance(keys, args)
  local pack, unpack, sub = struct.pack, struct.unpack, string.sub
  local open, sources_key = keys[1], keys[2]
  local ttl, idle, most = tonumber(args[1]), tonumber(args[2]), tonumber(args[3])
  local most_events, n = tonumber(args[4]), tonumber(args[5])
  local known, now, here, behind = read_sources(sources_key), now_ms(), {}, {}
  for i = 1, n do
    local id, least, progress, committed, first, last = unpack('<c6I6I6I6I6I6', args[5 + i])
    local s = known[id] or { progress = 0, offset = -1, index = 0, clock = -1, committed = 0, touched = 0 }
    if s.progress < least then behind[#behind + 1] = id .. pack('<I6', s.progress) end
    known[id], here[i] = s, { id = id, s = s, first = first, last = last, told = {}, due = keys[2 + i] }
    here[i].number = unpack('<I6', id)
    s.progress, s.committed = math.max(s.progress, progress), math.max(s.committed, committed)
  end
  if #behind > 0 then return { behind, {} } end
  for i = 1, n do here[i].s.touched = now end
  local waited_for = {}
  for _, s in pairs(known) do
    if now - s.touched < idle then waited_for[#waited_for + 1] = s end
  end

  local function fallen(source, clock, offset, index)
    local watermark = clock
    for _, s in ipairs(waited_for) do watermark = math.min(watermark, s.clock) end
    local found = {}
    for _, entity in ipairs(redis.call('ZRANGEBYSCORE', source.due, '-inf', '(' .. string.format('%.0f', watermark))) do
      local timer = redis.call('HGET', open, entity)
      local due, time, id, at, place = -1, 0, 0, 0, 0
      if timer then due, time, id, at, place = unpack(TIMER, timer) end
      if id == source.number and due >= watermark then
        redis.call('ZADD', source.due, string.format('%.0f', due), entity)
      else
        redis.call('ZREM', source.due, entity)
        if timer and id == source.number then
          redis.call('HDEL', open, entity)
          found[#found + 1] = { time, at, place, entity, timer }
        end
      end
    end
    table.sort(found, function(a, b)
      for i = 1, 3 do
        if a[i] ~= b[i] then return a[i] < b[i] end
      end
      return a[4] < b[4]
    end)
    for _, f in ipairs(found) do
      local record = pack(TOLD, offset, index, #f[4], #f[5]) .. f[4] .. f[5]
      source.told[#source.told + 1] = { record, offset }
    end
  end

  local function hear(source, late, offset, index, time, quiet, p, complete, entity, event)
    local due = math.max(time, source.s.clock) + quiet
    local timer = redis.call('HGET', open, entity)
    if timer then
      local held = { unpack(TIMER, timer) }
      local order, mine = { held[2], held[3], held[4], held[5] }, { time, source.number, offset, index }
      local later = false
      for i = 1, 4 do
        if order[i] ~= mine[i] then
          later = order[i] > mine[i]
          break
        end
      end
      if late or later then
        if late then held[6], held[7] = p, complete end
        local head = pack(TIMER, math.max(held[1], due), held[2], held[3], held[4], held[5], held[6], held[7])
        redis.call('HSET', open, entity, head .. sub(timer, TIMER_SIZE + 1))
        return
      end
    elseif late or redis.call('HLEN', open) >= most then
      return
    end
    if redis.call('HLEN', open) >= most_events then event = '' end
    redis.call('HSET', open, entity, pack(TIMER, due, time, source.number, offset, index, p, complete) .. event)
    redis.call('ZADD', source.due, string.format('%.0f', due), entity)
  end

  for i = 6 + n, #args, 3 do
    local kind, place, offset, index, time, quiet, p, complete = unpack(STEP, args[i])
    local source = here[place]
    local s = source.s
    if offset > s.offset or (offset == s.offset and index > s.index) then -- else applied before
      if kind ~= TICK then
        hear(source, kind ~= HEARD, offset, index, time, quiet, p, complete, args[i + 1], args[i + 2])
      elseif time > s.clock then
        s.clock = time
        fallen(source, time, offset, index)
      end
    end
  end

  local told = {}
  for i = 1, n do
    local source, s = here[i], here[i].s
    if source.last > s.offset or (source.last == s.offset and s.index < AFTER) then s.offset, s.index = source.last, AFTER end
    told[i] = keep_told(sources_key, source.id, s.committed, source.first, source.last, source.told)
    write_source(sources_key, source.id, s)
    redis.call('PEXPIRE', source.due, ttl)
  end
  redis.call('PEXPIRE', open, ttl)
  redis.call('PEXPIRE', sources_key, ttl)
  return { behind, told }
end

-- Check that what was told is remembered, and tell more. keys: sources. args: ttl, '1' for sources that come to a new
-- owner, who begins to read them now; of each source its id, the progress that it must have, progress now, committed.
-- Returns id and progress of those that have less.
local function mark(keys, args)
  local known, now, behind = read_sources(keys[1]), now_ms(), {}
  for i = 3, #args do
    local id, least, progress, committed = struct.unpack('<c6I6I6I6', args[i])
    local s = known[id]
    if (s and s.progress or 0) < least then behind[#behind + 1] = id .. struct.pack('<I6', s and s.progress or 0) end
    if not s or args[2] == '1' then
      s = s or { progress = 0, offset = -1, index = 0, clock = -1, committed = 0 }
      s.touched = now
    end
    s.progress, s.committed, known[id] = math.max(s.progress, progress), math.max(s.committed, committed), s
  end
  if #behind > 0 then return behind end
  for i = 3, #args do
    local id = string.sub(args[i], 1, 6)
    write_source(keys[1], id, known[id])
  end
  redis.call('PEXPIRE', keys[1], args[1])
  return behind
end

-- Say which topics sources are of. What was applied of a source of another topic was other events; its clock goes on, so
-- that those who were last heard there are still waited for. keys: sources. args: ttl; of each source its id, and the
-- number of its topic.
local function identify(keys, args)
  local key, known = keys[1], read_sources(keys[1])
  for i = 2, #args do
    local id, topic = string.sub(args[i], 1, 6), string.sub(args[i], 7)
    local before = redis.call('HGET', key, 'topic' .. id)
    if before ~= topic then
      redis.call('HSET', key, 'topic' .. id, topic)
      local s = known[id]
      if before and s then
        s.progress, s.committed, s.offset, s.index = 0, 0, -1, 0
        write_source(key, id, s)
        redis.call('HDEL', key, 'told' .. id)
      end
    end
  end
  redis.call('PEXPIRE', key, args[1])
end

redis.register_function('PREFIX_identify', identify)
redis.register_function('PREFIX_advance', advance)
redis.register_function('PREFIX_mark', mark)
