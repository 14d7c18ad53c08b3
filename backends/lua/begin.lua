-- Phase one of a write: one more mark on each counter. The writer waits for it, so it makes few calls; phase two sees to
-- the time to live of counters that were there.
-- KEYS: counters. ARGV: a version marked once and quarantined, for a counter that is missing; the same for one
-- whose marks are given up, since it has too many or is no version; the most marks that a counter may carry;
-- seconds to live.
-- Returns the incarnation that was marked of each.
local created, recreated, most, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local incarnations = {}
for i, version in ipairs(read_all(KEYS)) do
  if version and pending(version) < most then
    redis.call('INCR', KEYS[i])
  else
    version = redis.call('EXISTS', KEYS[i]) == 1 and recreated or created
    redis.call('SET', KEYS[i], version, 'EX', ttl)
  end
  incarnations[i] = incarnation(version)
end
return incarnations
