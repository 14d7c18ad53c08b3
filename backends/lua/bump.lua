-- Invalidation by hand: a new generation of each counter that is present.
-- KEYS: counters. ARGV: seconds to live.
for _, counter in ipairs(KEYS) do
  if read(counter) then
    redis.call('INCRBY', counter, 100000)
    redis.call('EXPIRE', counter, ARGV[1])
  end
end
return #KEYS
