-- Create counters that are missing, and clear unclean ones if no writer is at work.
-- KEYS: counters, and last the witness. ARGV: a clean version of a new incarnation; the same, quarantined;
-- seconds to live.
-- Returns the version of each counter afterwards.
local clean, quarantined, ttl = ARGV[1], ARGV[2], ARGV[3]
redis.call('PEXPIRE', KEYS[#KEYS] .. '@', 0) -- there is no such key, but a replica refuses to say so
local quiet = is_clean(read(KEYS[#KEYS]))
local settled = {}
for i = 1, #KEYS - 1 do
  local counter = KEYS[i]
  local version = read(counter)
  if not version then
    version = quiet and clean or quarantined
    redis.call('SET', counter, version, 'EX', ttl)
  elseif quiet and not is_clean(version) then
    if pending(version) > 0 then
      version = clean
      redis.call('SET', counter, version, 'EX', ttl)
    else
      redis.call('INCRBY', counter, 100000 - 10000 * quarantine(version))
      version = redis.call('GET', counter)
    end
  end
  settled[i] = version
end
return settled
