-- Phase one of a write, where plain increments did not do: one more mark on each counter.
-- KEYS: counters. ARGV: a version marked once whose marks are given up, for a counter that has too many, or held no
-- version when it was incremented; the most marks that a counter may carry; seconds to live.
-- Returns for each a version of the incarnation that was marked.
local recreated, most, ttl = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local marked = {}
for i, version in ipairs(read_all(KEYS)) do
  if version and pending(version) < most then
    redis.call('INCR', KEYS[i])
  else
    version = recreated
    redis.call('SET', KEYS[i], version, 'EX', ttl)
  end
  marked[i] = version
end
return marked
