"""The Lua scripts of the Redis store.

Item, stream entry and peer position change together because one script changes them. Order tuples
are compared as numbers and bytes and never with ``<`` on strings, which in Redis's Lua follows the
server's locale. Lua has no SHA-256 and its numbers are doubles: hashes come from the client, and
both numbers of an order tuple are below 2**53.

The Merkle nodes of a later layout belong into :data:`_KEEP`, where an item and its stream entry
are written: everything that changes with an item changes there.
"""

from __future__ import annotations

from typing import Final

__all__ = ("APPLY", "DELETE", "FETCH", "OPEN", "PUT")

# newer(a, b): whether stamp a is larger than stamp b; both are 50 bytes.
# held_stamp(): the stamp of what is held, "" where nothing is, and false where something stands
# that is no item: that is somebody's, and is neither overwritten nor taken for an item.
_NEWER: Final = """
local function held_stamp(item_key)
  local held = redis.pcall('GETRANGE', item_key, 0, 49)
  if type(held) == 'table' then
    if string.find(held.err, 'WRONGTYPE', 1, true) then return false end
    redis.call('GETRANGE', item_key, 0, 49)
  end
  if held ~= '' and #held < 50 then return false end
  return held
end
local function newer(a, b)
  if a == b then return false end
  local at, av = struct.unpack('>I8I8', a)
  local bt, bv = struct.unpack('>I8I8', b)
  if at ~= bt then return at > bt end
  if av ~= bv then return av > bv end
  for i = 17, 50 do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x > y end
  end
  return false
end
local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
"""

# keep(): writes an item and its stream entry. KEYS[1] is the stream, ARGV[1] its length at most.
_KEEP: Final = """
local function keep(item_key, key, value, digest, meta, deleted, keep_until)
  if deleted then
    redis.call('SET', item_key, value, 'PXAT', string.format('%.0f', keep_until))
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*',
      'op', 'DEL', 'key', key, 'meta', meta)
  else
    redis.call('SET', item_key, value)
    local data = string.sub(value, 52 + string.byte(value, 51))
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*',
      'op', 'PUT', 'key', key, 'hash', digest, 'data', data, 'meta', meta)
  end
end
"""

# KEYS: marker. ARGV: node id, format, ttl in ms, resolver, new incarnation.
# Returns "" and the incarnation; or, of a Redis that is not ours, the field that differs and its
# value.
OPEN: Final = """
local held = redis.call('HMGET', KEYS[1], 'node_id', 'format', 'tombstone_ttl_ms', 'resolver')
if held[1] and held[1] ~= ARGV[1] then return {'node_id', held[1]} end
if held[2] and tonumber(held[2]) > tonumber(ARGV[2]) then return {'format', held[2]} end
redis.call('HSETNX', KEYS[1], 'incarnation', ARGV[5])
redis.call('HSET', KEYS[1], 'node_id', ARGV[1], 'format', ARGV[2], 'layouts', '',
  'tombstone_ttl_ms', ARGV[3], 'resolver', ARGV[4], 'partitions', '0')
return {'', redis.call('HGET', KEYS[1], 'incarnation')}
"""

# KEYS: stream, positions. ARGV: maxlen, ttl in ms, grace in ms, item prefix, peer id, position,
# then key, value, digest in hex, meta for each item. An empty position is not kept.
# Returns one code per item (0 applied, 1 superseded, 2 refused: what is held is no item) as a
# string, and the live items deleted.
APPLY: Final = (
    _NEWER
    + _KEEP
    + """
local ttl, grace, prefix = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local now = now_ms()
local codes, live_deleted = {}, 0
for i = 7, #ARGV, 4 do
  local key, value = ARGV[i], ARGV[i + 1]
  local item_key = prefix .. key
  local held = held_stamp(item_key)
  local code = '1'
  if not held then
    code = '2'
  elseif held == '' or newer(string.sub(value, 1, 50), held) then
    local deleted = string.byte(value, 17) == 1
    local expiry = 0
    if deleted then expiry = struct.unpack('>I8', value) + ttl end
    if not (deleted and held == '' and expiry <= now) then
      code = '0'
      if deleted and held ~= '' and string.byte(held, 17) == 0 then
        live_deleted = live_deleted + 1
      end
      keep(item_key, key, value, ARGV[i + 2], ARGV[i + 3], deleted, math.max(expiry, now) + grace)
    end
  end
  codes[#codes + 1] = code
end
if ARGV[6] ~= '' then redis.call('HSET', KEYS[2], ARGV[5], ARGV[6]) end
return {table.concat(codes), live_deleted}
"""
)

_NEXT: Final = """
local function next_stamp(held)
  local now = now_ms()
  if held == '' then return now, 1 end
  local at, version = struct.unpack('>I8I8', held)
  return math.max(now, at + 1), version + 1
end
local LIMIT = 9007199254740991
"""

# KEYS: stream. ARGV: maxlen, item prefix, then for each item: key, hash and type as bytes with
# origin and data after them, digest in hex, head of meta, tail of meta.
# Returns updated_at and version of each as text.
PUT: Final = (
    _NEWER
    + _KEEP
    + _NEXT
    + """
local out = {}
for i = 3, #ARGV, 5 do
  local key = ARGV[i]
  local item_key = ARGV[2] .. key
  local held = held_stamp(item_key)
  if not held then return redis.error_reply('NOITEM ' .. key) end
  local at, version = next_stamp(held)
  if at > LIMIT or version > LIMIT then return redis.error_reply('RANGE ' .. key) end
  local value = struct.pack('>I8I8B', at, version, 0) .. ARGV[i + 1]
  local at_text, version_text = string.format('%.0f', at), string.format('%.0f', version)
  local meta = ARGV[i + 3] .. version_text .. ',"updated_at":' .. at_text .. ARGV[i + 4]
  keep(item_key, key, value, ARGV[i + 2], meta, false, 0)
  out[#out + 1] = at_text
  out[#out + 1] = version_text
end
return out
"""
)

# KEYS: stream. ARGV: maxlen, item prefix, key, tail of the value, tail of meta, ttl and grace in
# ms. Returns 1 if there was a live item, else 0.
DELETE: Final = (
    _NEWER
    + _KEEP
    + _NEXT
    + """
local item_key = ARGV[2] .. ARGV[3]
local held = held_stamp(item_key)
if not held then return redis.error_reply('NOITEM ' .. ARGV[3]) end
if held == '' or string.byte(held, 17) == 1 then return 0 end
local at, version = next_stamp(held)
if at > LIMIT or version > LIMIT then return redis.error_reply('RANGE ' .. ARGV[3]) end
local value = struct.pack('>I8I8B', at, version, 1) .. ARGV[4]
local meta = '{"version":' .. string.format('%.0f', version)
  .. ',"updated_at":' .. string.format('%.0f', at) .. ARGV[5]
keep(item_key, ARGV[3], value, '', meta, true, at + tonumber(ARGV[6]) + tonumber(ARGV[7]))
return 1
"""
)

# ARGV: item prefix, bytes to stop after, then keys. Returns the values of the first of them, as MGET
# would, in a reply that is larger than the limit by one value at most.
FETCH: Final = """
local values, filled, limit = {}, 0, tonumber(ARGV[2])
for i = 3, #ARGV do
  local value = redis.pcall('GET', ARGV[1] .. ARGV[i])
  if type(value) == 'table' then
    if not string.find(value.err, 'WRONGTYPE', 1, true) then
      redis.call('GET', ARGV[1] .. ARGV[i])
    end
    value = false
  end
  values[#values + 1] = value
  if value then filled = filled + #value end
  if filled > limit then break end
end
return values
"""
