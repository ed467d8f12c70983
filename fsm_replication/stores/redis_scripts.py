"""The Lua scripts of the Redis store.

Item, tree, stream entry and peer position change together because one script changes them. Order
tuples are compared as numbers and bytes and never with ``<`` on strings, which in Redis's Lua
follows the server's locale. Lua has no SHA-256 and its numbers are doubles: hashes come from the
client, both numbers of an order tuple are below 2**53, and the tree folds 32-bit words.

Every script that writes takes the name of the tree's key, "" where the node keeps none. The digest
of a bucket changes with the item; those of branches and root are collected and folded in at the
end, so that a batch pays for them once. An item's value carries the digest of its leaf, so the old one need not be hashed anew.
"""

from __future__ import annotations

from typing import Final

__all__ = (
    "APPLY",
    "BUILD",
    "CLEAR",
    "CLEAR_BRANCH",
    "DELETE",
    "FETCH",
    "MERGE",
    "OPEN",
    "PUT",
    "SWEEP",
)

# not_an_item(error): whether a read failed because something stands there that is no string: that
# is somebody's, and is neither overwritten nor taken for an item.
# newer(a, b): whether stamp a is larger than stamp b; both begin with 50 bytes of order tuple.
_COMMON: Final = """
local call = redis.call
local byte, sub, pack, unpack_bytes = string.byte, string.sub, struct.pack, struct.unpack
local function not_an_item(error)
  local text = type(error) == 'table' and error.err or error
  return string.find(tostring(text), 'WRONGTYPE', 1, true) ~= nil
end
local function newer(a, b)
  local at, av = unpack_bytes('>I8I8', a)
  local bt, bv = unpack_bytes('>I8I8', b)
  if at ~= bt then return at > bt end
  if av ~= bv then return av > bv end
  for i = 17, 50 do
    local x, y = byte(a, i), byte(b, i)
    if x ~= y then return x > y end
  end
  return false
end
local function now_ms()
  local t = call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
"""

# The tree: plant(), uproot() and sweep() change leaves and buckets and note what to fold into the
# branches and the root; fold() does that. Branches count from 1 here, so that the root's digest
# lies at 0 and a branch's at 8 times its number.
_TREE: Final = """
local WORD = 4294967296
local root_high, root_low, live = 0, 0, 0
local highs, lows, touched = {}, {}, 0
local function bump(tree, at, high, low)
  local old = call('GETRANGE', tree, at, at + 7)
  if #old == 8 then
    local h, l = unpack_bytes('>I4I4', old)
    high, low = high + h, low + l
  end
  call('SETRANGE', tree, at, pack('>I4I4', high % WORD, low % WORD))
end
local function note(tree, bucket, high, low)
  bump(tree, 1032 + bucket * 8, high, low)
  local branch = (bucket - bucket % 128) / 128 + 1
  local held = highs[branch]
  if held then
    highs[branch], lows[branch] = held + high, lows[branch] + low
  else
    highs[branch], lows[branch], touched = high, low, touched + 1
  end
end
local function digest_of(key, stamp)
  local hex = redis.sha1hex(pack('>I2', #key) .. key .. stamp)
  return pack('>I4I4', tonumber(sub(hex, 1, 8), 16), tonumber(sub(hex, 9, 16), 16))
end
local function uproot(tree, bucket, key)
  local stamp = call('HGET', tree .. ':' .. bucket, key)
  if stamp then
    call('HDEL', tree .. ':' .. bucket, key)
    local high, low = unpack_bytes('>I4I4', digest_of(key, stamp))
    note(tree, bucket, -high, -low)
  end
end
local function plant(tree, bucket, key, stamp, digest, held)
  local leaves = tree .. ':' .. bucket
  local high, low = unpack_bytes('>I4I4', digest)
  if held ~= '' then
    if call('HSET', leaves, key, stamp) == 0 then
      local old_high, old_low = unpack_bytes('>I4I4', held, 51)
      high, low = high - old_high, low - old_low
    end
  elseif call('HSETNX', leaves, key, stamp) == 0 then
    -- Its item went away by itself, as an expired tombstone does after its grace.
    uproot(tree, bucket, key)
    call('HSET', leaves, key, stamp)
  end
  note(tree, bucket, high, low)
end
local function expires(tree, bucket, key, expiry)
  call('ZADD', tree .. ':expiring', string.format('%.0f', expiry), bucket .. ':' .. key)
end
local function sweep(tree, now, ttl, most)
  local due = call('ZRANGEBYSCORE', tree .. ':expiring', '-inf', string.format('%.0f', now),
    'LIMIT', 0, most)
  for _, member in ipairs(due) do
    local colon = string.find(member, ':', 1, true)
    local bucket, key = sub(member, 1, colon - 1), sub(member, colon + 1)
    local stamp = call('HGET', tree .. ':' .. bucket, key)
    if stamp and byte(stamp, 17) == 1 and unpack_bytes('>I8', stamp) + ttl <= now then
      uproot(tree, bucket, key)
    end
    call('ZREM', tree .. ':expiring', member)
  end
  return #due
end
local function fold(tree)
  if live ~= 0 then call('INCRBY', KEYS[#KEYS], live) end
  if touched == 0 then return end
  for branch, high in pairs(highs) do
    root_high, root_low = root_high + high, root_low + lows[branch]
  end
  if touched < 8 then
    for branch, high in pairs(highs) do bump(tree, branch * 8, high, lows[branch]) end
    bump(tree, 0, root_high, root_low)
    return
  end
  -- Many branches: all of them at once cost less than each by itself.
  local form = '>' .. string.rep('I4', 258)
  local raw = call('GETRANGE', tree, 0, 1031)
  if #raw < 1032 then raw = raw .. string.rep('\\0', 1032 - #raw) end
  local words = {unpack_bytes(form, raw)}
  words[1] = (words[1] + root_high) % WORD
  words[2] = (words[2] + root_low) % WORD
  for branch, high in pairs(highs) do
    local at = 1 + branch * 2
    words[at] = (words[at] + high) % WORD
    words[at + 1] = (words[at + 1] + lows[branch]) % WORD
  end
  call('SETRANGE', tree, 0, pack(form, unpack(words, 1, 258)))
end
"""

# keep(): writes an item, its leaf and its stream entry, and marks its key where a publisher of the
# dotted layout waits for that (``dirty``). KEYS[1] is the stream, ARGV[1] its length at most, the last
# two of KEYS the marker and the number of live items. ``expiry`` is given for a tombstone only. Nothing
# is written where there is no marker: a Redis that came back empty would have a stream and no marker,
# and be taken for a foreign node.
_KEEP: Final = """
if redis.call('EXISTS', KEYS[#KEYS - 1]) == 0 then return redis.error_reply('NOMARKER it is gone') end
local dirty = ''
local function keep(tree, bucket, item_key, key, value, held, digest, meta, expiry, now, grace)
  if dirty ~= '' then call('ZADD', dirty, 0, key) end
  local was_live = held ~= '' and byte(held, 17) == 0 and 1 or 0
  if expiry then
    live = live - was_live
    call('SET', item_key, value, 'PXAT', string.format('%.0f', math.max(expiry, now) + grace))
    if tree ~= '' then
      if expiry > now then
        plant(tree, bucket, key, sub(value, 1, 50), sub(value, 51, 58), held)
        expires(tree, bucket, key, expiry)
      else
        uproot(tree, bucket, key)
      end
    end
    call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'op', 'DEL', 'key', key, 'meta', meta)
  else
    live = live + 1 - was_live
    call('SET', item_key, value)
    if tree ~= '' then
      plant(tree, bucket, key, sub(value, 1, 50), sub(value, 51, 58), held)
    end
    call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'op', 'PUT', 'key', key, 'hash', digest,
      'data', sub(value, 60 + byte(value, 59)), 'meta', meta)
  end
end
"""

# KEYS: marker. ARGV: node id, format, ttl in ms, resolver, new incarnation, layouts and partitions of a
# Redis that is empty: there is nothing to plant, and no reader must find it without a tree.
# Returns "", the incarnation and the layouts that are published; or, of a Redis that is not ours,
# the field that differs and its value.
OPEN: Final = """
local held = redis.call('HMGET', KEYS[1], 'node_id', 'format', 'tombstone_ttl_ms', 'resolver')
if held[1] and held[1] ~= ARGV[1] then return {'node_id', held[1], ''} end
if held[2] and tonumber(held[2]) > tonumber(ARGV[2]) then return {'format', held[2], ''} end
if redis.call('DBSIZE') == 0 then
  redis.call('HSET', KEYS[1], 'layouts', ARGV[6], 'partitions', ARGV[7])
end
redis.call('HSETNX', KEYS[1], 'incarnation', ARGV[5])
redis.call('HSETNX', KEYS[1], 'layouts', '')
redis.call('HSET', KEYS[1], 'node_id', ARGV[1], 'format', ARGV[2], 'tombstone_ttl_ms', ARGV[3],
  'resolver', ARGV[4])
redis.call('HSETNX', KEYS[1], 'partitions', '0')
return {'', redis.call('HGET', KEYS[1], 'incarnation'), redis.call('HGET', KEYS[1], 'layouts')}
"""

# KEYS: stream, positions, marker, live. ARGV: maxlen, ttl in ms, grace in ms, item prefix, peer id,
# position, tree, dirty keys or '', the incarnation that is meant or '', then key, value, digest in hex,
# meta, bucket for each item. An empty position is not kept. Returns one code per item (0 applied, 1 superseded, 2 refused: what is held is no
# item, 4 refused: the dotted layout keeps its own under that name) as a string, the live items deleted, and the keys that came to life.
# The loop is one protected call and not one for each item, which would cost a fifth of the script:
# where a read fails on a key of a wrong type, that item is refused and the loop goes on after it.
_APPLY: Final = (
    _COMMON
    + _TREE
    + _KEEP
    + """
if ARGV[9] ~= '' and redis.call('HGET', KEYS[3], 'incarnation') ~= ARGV[9] then
  return redis.error_reply('NOMARKER it is another one')
end
local ttl, grace, prefix, tree = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[7]
local now = now_ms()
local codes, count, live_deleted, live_added = {}, 0, 0, 0
local at, reading = 10, false
dirty = ARGV[8]
local function is_reserved(key)
  if dirty == '' then return false end
  local five = sub(key, 1, 5)
  return sub(key, 1, 3) == 'cdc' or five == 'item:' or sub(key, 1, 7) == 'merkle:'
    or sub(five, 1, 4) == 'fsm:'
end
local function run()
  for i = at, #ARGV, STRIDE do
    at = i
    local key, value = ARGV[i], ARGV[i + 1]
    local item_key = prefix .. key
    reading = true
    local held = call('GETRANGE', item_key, '0', '57')
    reading = false
    local code = '1'
    if held ~= '' and #held < 58 then
      code = '2'
    elseif is_reserved(key) then
      code = '4'
    elseif WANTED then
      local expiry
      if byte(value, 17) == 1 then expiry = unpack_bytes('>I8', value) + ttl end
      if not (expiry and held == '' and expiry <= now) then
        code = '0'
        local was_live = held ~= '' and byte(held, 17) == 0
        if expiry and was_live then live_deleted = live_deleted + 1 end
        if not (expiry or was_live) then live_added = live_added + 1 end
        keep(tree, ARGV[i + 4], item_key, key, value, held, ARGV[i + 2], ARGV[i + 3], expiry, now,
          grace)
      end
    end
    count = count + 1
    codes[count] = code
  end
  at = #ARGV + 1
end
repeat
  local fine, why = pcall(run)
  if not fine then
    if not (reading and not_an_item(why)) then
      fold(tree)
      error(why)
    end
    reading = false
    count = count + 1
    codes[count] = '2'
    at = at + STRIDE
  end
until at > #ARGV
if tree ~= '' then sweep(tree, now, ttl, 16) end
fold(tree)
if ARGV[6] ~= '' then call('HSET', KEYS[2], ARGV[5], ARGV[6]) end
return {table.concat(codes), live_deleted, live_added}
"""
)
APPLY: Final = _APPLY.replace("STRIDE", "5").replace("WANTED", "held == '' or newer(value, held)")

# As APPLY, for a resolver that looks at contents: each item has one argument more, the order tuple
# of what was held when the client made it, "" for nothing. Where something else is held by
# now the code is 3, and the client makes the item anew.
MERGE: Final = (
    _APPLY.replace("STRIDE", "6")
    .replace("WANTED", "sub(held, 1, 50) == ARGV[i + 5]")
    .replace("local code = '1'", "local code = sub(held, 1, 50) == ARGV[i + 5] and '1' or '3'")
)

# held_head(): the first 58 bytes of what is held, "" where nothing is, false where it is no item.
_NEXT: Final = """
local function held_head(item_key)
  local held = redis.pcall('GETRANGE', item_key, '0', '57')
  if type(held) == 'table' then
    if not_an_item(held) then return false end
    call('GETRANGE', item_key, '0', '57')
  end
  if held ~= '' and #held < 58 then return false end
  return held
end
-- The third value tells that what is held lies so far ahead that peers would refuse a write over it.
local function next_stamp(held, now)
  if held == '' then return now, 1 end
  local at, version = unpack_bytes('>I8I8', held)
  if at > now + 86400000 then return at, version, string.format('AHEAD %.0f ', at) end
  return math.max(now, at + 1), version + 1
end
local LIMIT = 9007199254740991
-- In an error a line's end would become a space.
local function hex(text)
  return (string.gsub(text, '.', function(one) return string.format('%02x', byte(one)) end))
end
"""

# KEYS: stream, marker, live. ARGV: maxlen, item prefix, tree, dirty keys, then for each item: key, hash and type as bytes,
# origin and data as bytes, digest in hex, head of meta, tail of meta, bucket.
# Returns updated_at and version of each as text.
PUT: Final = (
    _COMMON
    + _TREE
    + _KEEP
    + _NEXT
    + """
local out, tree, now = {}, ARGV[3], now_ms()
dirty = ARGV[4]
for i = 5, #ARGV, 7 do
  local key = ARGV[i]
  local item_key = ARGV[2] .. key
  local held = held_head(item_key)
  local refusal = not held and 'NOITEM '
  local at, version
  if held then
    at, version, refusal = next_stamp(held, now)
    if refusal then
      key = hex(key)
    elseif at > LIMIT or version > LIMIT then
      refusal = 'RANGE '
    end
  end
  if refusal then
    fold(tree)
    return redis.error_reply(refusal .. key)
  end
  local stamp = pack('>I8I8B', at, version, 0) .. ARGV[i + 1]
  local value = stamp .. digest_of(key, stamp) .. ARGV[i + 2]
  local at_text, version_text = string.format('%.0f', at), string.format('%.0f', version)
  local meta = ARGV[i + 4] .. version_text .. ',"updated_at":' .. at_text .. ARGV[i + 5]
  keep(tree, ARGV[i + 6], item_key, key, value, held, ARGV[i + 3], meta, nil, now, 0)
  out[#out + 1] = at_text
  out[#out + 1] = version_text
end
fold(tree)
return out
"""
)

# KEYS: stream, marker, live. ARGV: maxlen, item prefix, tree, dirty keys, key, hash and type as bytes,
# origin as bytes, tail of meta, bucket, ttl and grace in ms. Returns 1 if there was a live item, else 0.
DELETE: Final = (
    _COMMON
    + _TREE
    + _KEEP
    + _NEXT
    + """
local tree, key, now = ARGV[3], ARGV[5], now_ms()
local ttl, grace = tonumber(ARGV[10]), tonumber(ARGV[11])
dirty = ARGV[4]
local item_key = ARGV[2] .. key
local held = held_head(item_key)
if not held then return redis.error_reply('NOITEM ' .. key) end
if held == '' or byte(held, 17) == 1 then return 0 end
local at, version, refusal = next_stamp(held, now)
if refusal then return redis.error_reply(refusal .. hex(key)) end
if at > LIMIT or version > LIMIT then return redis.error_reply('RANGE ' .. key) end
local stamp = pack('>I8I8B', at, version, 1) .. ARGV[6]
local value = stamp .. digest_of(key, stamp) .. ARGV[7]
local meta = '{"version":' .. string.format('%.0f', version)
  .. ',"updated_at":' .. string.format('%.0f', at) .. ARGV[8]
keep(tree, ARGV[9], item_key, key, value, held, '', meta, at + ttl, now, grace)
if tree ~= '' then sweep(tree, now, ttl, 16) end
fold(tree)
return 1
"""
)

# ARGV: tree, ttl in ms, how many at most. Takes expired tombstones out of the tree; returns how
# many entries it looked at.
SWEEP: Final = (
    _COMMON
    + _TREE
    + """
local swept = sweep(ARGV[1], now_ms(), tonumber(ARGV[2]), tonumber(ARGV[3]))
fold(ARGV[1])
return swept
"""
)

# ARGV: tree, item prefix, ttl in ms, then key and bucket of items. Plants the leaves that are
# missing; returns how many keys held no item.
BUILD: Final = (
    _COMMON
    + _TREE
    + _NEXT
    + """
local tree, ttl, now, skipped = ARGV[1], tonumber(ARGV[3]), now_ms(), 0
for i = 4, #ARGV, 2 do
  local key, bucket = ARGV[i], ARGV[i + 1]
  local held = held_head(ARGV[2] .. key)
  if not held or held == '' then
    skipped = skipped + 1
  else
    local stamp, leaves = sub(held, 1, 50), tree .. ':' .. bucket
    local expiry
    if byte(stamp, 17) == 1 then expiry = unpack_bytes('>I8', stamp) + ttl end
    if not (expiry and expiry <= now) and call('HSETNX', leaves, key, stamp) == 1 then
      local digest = digest_of(key, stamp)
      -- What was written without a tree has no digest yet.
      if sub(held, 51, 58) ~= digest then call('SETRANGE', ARGV[2] .. key, 50, digest) end
      note(tree, bucket, unpack_bytes('>I4I4', digest))
      if expiry then expires(tree, bucket, key, expiry) end
    end
  end
end
fold(tree)
return skipped
"""
)

# KEYS: keys of a tree to be forgotten.
CLEAR: Final = "return redis.call('UNLINK', unpack(KEYS))"

# ARGV: tree, branch from 0. Takes every leaf below a branch out, with all digests that they are in: so
# a tree is right at every moment, whoever plants in it meanwhile.
CLEAR_BRANCH: Final = (
    _COMMON
    + """
local tree, branch = ARGV[1], tonumber(ARGV[2])
local leaves = {}
for bucket = branch * 128, branch * 128 + 127 do leaves[#leaves + 1] = tree .. ':' .. bucket end
call('UNLINK', unpack(leaves))
call('SETRANGE', tree, 1032 + branch * 1024, string.rep('\\0', 1024))
call('SETRANGE', tree, 8 + branch * 8, string.rep('\\0', 8))
local words = {unpack_bytes('>' .. string.rep('I4', 256), call('GETRANGE', tree, 8, 1031))}
local high, low = 0, 0
for i = 1, 256, 2 do high, low = high + words[i], low + words[i + 1] end
call('SETRANGE', tree, 0, pack('>I4I4', high % 4294967296, low % 4294967296))
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
