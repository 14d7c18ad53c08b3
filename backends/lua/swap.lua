-- Compare and swap.
-- KEYS: counters. ARGV: seconds to live; then for each counter the version it must have (empty: it is missing),
-- and the version it gets.
-- Returns 1 for each counter that was changed, 0 for the others.
local done = {}
for i, counter in ipairs(KEYS) do
  local expected = ARGV[2 * i]
  done[i] = 0
  if redis.call('GET', counter) == (expected ~= '' and expected) then
    redis.call('SET', counter, ARGV[2 * i + 1], 'EX', ARGV[1])
    done[i] = 1
  end
end
return done
