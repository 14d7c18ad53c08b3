-- Phase two of a write: a new generation of each counter, and the mark taken off where it is this writer's.
-- KEYS: counters. ARGV[1]: what each of them was when it had been marked, of 19 digits each.
-- Each commit runs this, and while it runs everybody waits: numbers as text, which Lua need not format, no EXPIRE, which
-- phase one sees to, and nearly always no look at the fields, for nobody else was at the counter meanwhile.
for first = 1, #KEYS, 1000 do -- Lua's stack has room for 8000 arguments
  for offset, version in ipairs(redis.call('MGET', unpack(KEYS, first, math.min(first + 999, #KEYS)))) do
    local i = first + offset - 1
    local marked = string.sub(ARGV[1], 19 * i - 18, 19 * i)
    if version == marked then
      redis.call('INCRBY', KEYS[i], '99999')
    elseif is_version(version) then
      local mine = incarnation(version) == string.sub(marked, 1, 8) and pending(version) > 0
      redis.call('INCRBY', KEYS[i], mine and '99999' or '100000')
    end
  end
end
return #KEYS
