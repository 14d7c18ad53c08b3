-- Put in front of every other script of this directory.
--
-- A version is text of 19 digits, see querycache/versions.py:
--   incarnation (8) generation (6) quarantine (1) pending (4)
-- Lua's numbers are doubles and cannot hold it, so fields are read off the text, and INCRBY, which works on
-- 64-bit integers, does the arithmetic: 100000 is one generation, 10000 the quarantine of a counter that was
-- missing, 20000 that of one whose marks were given up, 1 one pending writer.

local function is_version(text)
  return text and #text == 19 and not string.find(text, '%D') and text >= '1' and text < '92000001'
end

-- The version of a counter, or nil if it is missing or not a version.
local function read(counter)
  local text = redis.call('MGET', counter)[1] -- as GET, but nothing where it is no text
  return is_version(text) and text or nil
end

-- The version of each counter, or false; in few calls. (Lua's stack has room for 8000 arguments.)
local function read_all(counters)
  local versions = {}
  for first = 1, #counters, 1000 do
    for _, text in ipairs(redis.call('MGET', unpack(counters, first, math.min(first + 999, #counters)))) do
      versions[#versions + 1] = is_version(text) and text
    end
  end
  return versions
end

local function is_clean(version)
  return version ~= nil and string.sub(version, 15) == '00000'
end

local function pending(version)
  return tonumber(string.sub(version, 16))
end

local function quarantine(version)
  return tonumber(string.sub(version, 15, 15))
end

local function incarnation(version)
  return string.sub(version, 1, 8)
end
