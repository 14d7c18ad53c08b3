-- Phase one of a write: one more mark on each counter.
-- KEYS: counters. ARGV: a version that is quarantined and marked once, for counters that need a new incarnation;
-- the most marks that a counter may carry; seconds to live.
-- Returns the incarnation that was marked of each.
local created, most, ttl = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local incarnations = {}
for i, counter in ipairs(KEYS) do
  local version = read(counter)
  if version and pending(version) < most then
    redis.call('INCR', counter)
    redis.call('EXPIRE', counter, ttl)
  else
    version = created
    redis.call('SET', counter, created, 'EX', ttl)
  end
  incarnations[i] = incarnation(version)
end
return incarnations
