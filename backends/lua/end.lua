-- Phase two of a write: a new generation of each counter, and the mark taken off where it is this writer's.
-- KEYS: counters. ARGV: the incarnation that was marked of each.
for i, counter in ipairs(KEYS) do
  local version = read(counter)
  if version then
    local mine = incarnation(version) == ARGV[i] and pending(version) > 0
    redis.call('INCRBY', counter, mine and 99999 or 100000)
  end
end
return #KEYS
