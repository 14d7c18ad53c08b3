-- Phase one of a write: one more mark on each counter.
-- KEYS: counters. ARGV: a version marked once and quarantined, for a counter that is missing; the same for one
-- whose marks are given up, since it has too many or is no version; the most marks that a counter may carry;
-- seconds to live.
-- Returns the incarnation that was marked of each.
local created, recreated, most, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local incarnations = {}
for i, counter in ipairs(KEYS) do
  local version = read(counter)
  if version and pending(version) < most then
    redis.call('INCR', counter)
    redis.call('EXPIRE', counter, ttl)
  else
    version = redis.call('EXISTS', counter) == 1 and recreated or created
    redis.call('SET', counter, version, 'EX', ttl)
  end
  incarnations[i] = incarnation(version)
end
return incarnations
