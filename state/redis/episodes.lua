-- The book of episodes, server side: one hash of names and values, and under "v" a version that is new at each change.
-- (It is of one change, and says nothing of the format: that stands in the key, see formats.py.)

-- Store what changed if the book is still of the version that the caller has. args: that version, the next one, ttl in
-- ms, then names and values (empty: delete). Returns the version that is there now, and nil if it was stored (or there
-- was nothing to store), else all names and values.
local function swap(keys, args)
  local key = keys[1]
  local version = redis.call('HGET', key, 'v') or ''
  if version ~= args[1] then return { version, redis.call('HGETALL', key) } end
  if #args == 3 then return { version, false } end
  for i = 4, #args, 2 do
    if args[i + 1] == '' then
      redis.call('HDEL', key, args[i])
    else
      redis.call('HSET', key, args[i], args[i + 1])
    end
  end
  redis.call('HSET', key, 'v', args[2])
  redis.call('PEXPIRE', key, args[3])
  return { args[2], false }
end

redis.register_function('PREFIX_swap', swap)
