-- Phase two of a write: a new generation of each counter, and the mark taken off where it is this writer's.
-- KEYS: counters. ARGV[1]: what each of them was when it had been marked, of 19 digits each.
-- Each commit runs this, and while it runs everybody waits: numbers as text, which Lua need not format, and no EXPIRE, which
-- phase one sees to, make it take half the time.
for i, version in ipairs(read_all(KEYS)) do
  if version then
    local marked = string.sub(ARGV[1], 19 * i - 18, 19 * i - 11)
    local mine = incarnation(version) == marked and pending(version) > 0
    redis.call('INCRBY', KEYS[i], mine and '99999' or '100000')
  end
end
return #KEYS
