-- Phase two of a write: a new generation of each counter, and the mark taken off where it is this writer's.
-- KEYS: counters. ARGV: seconds to live; then the incarnation that was marked of each.
for i, version in ipairs(read_all(KEYS)) do
  if version then
    local mine = incarnation(version) == ARGV[i + 1] and pending(version) > 0
    redis.call('INCRBY', KEYS[i], mine and 99999 or 100000)
    redis.call('EXPIRE', KEYS[i], ARGV[1])
  end
end
return #KEYS
