-- Compare and swap.
-- KEYS: counters. ARGV: seconds to live; then for each counter the version it must have (empty: it is missing),
-- and the version it gets.
-- Returns 1 for each counter that was changed, 0 for the others.
local done = {}
for i, counter in ipairs(KEYS) do
  done[i] = 0
  if (read(counter) or '') == ARGV[2 * i] then
    redis.call('SET', counter, ARGV[2 * i + 1], 'EX', ARGV[1])
    done[i] = 1
  end
end
return done
