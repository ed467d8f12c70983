"""The Lua scripts of the Redis store.

Item, tree, stream entry and peer position change together because one script changes them. Order
tuples are compared as numbers and bytes and never with ``<`` on strings, which in Redis's Lua
follows the server's locale. Lua has no SHA-256 and its numbers are doubles: hashes come from the
client, both numbers of an order tuple are below 2**53, and the tree folds 32-bit words.

Redis undoes nothing of a script that fails, so what can fail comes before everything that cannot be
undone. First each command does nothing once (``prepare``): what the user may not do, a key that holds
something else, a full memory. Then, for each item, its leaf, which can be put back, and its stream
entry. After that nothing can fail any more. Items of a call before the one that failed are whole.

Every script that changes items begins with the same keys and arguments (``_HEAD``): among them the
name of the tree's key, "" where the node keeps none. The digest of a bucket changes with the item;
those of branches and root are collected and folded in at the end, so that a batch pays for them once.
An item's value carries the digest of its leaf, so the old one need not be hashed anew.

How long tombstones count is read from the marker, where it may be changing: see ``redis_upkeep``. A
process that was configured with another ttl or resolver than the marker names writes nothing.
"""

from __future__ import annotations

from typing import Final

__all__ = (
    "ANNOUNCE",
    "APPLY",
    "BEAT",
    "BUILD",
    "CLEAR",
    "CLEAR_BRANCH",
    "DELETE",
    "FETCH",
    "LEAVE",
    "MERGE",
    "NO_ITEM",
    "NO_MARKER",
    "OPEN",
    "PUT",
    "REALIGN",
    "RECONFIGURED",
    "SWEEP",
)

# How the errors begin that scripts answer with.
NO_MARKER: Final = "NOMARKER"
RECONFIGURED: Final = "RECONFIGURED"
NO_ITEM: Final = "NOITEM"

# told(error): the text of a failure. not_an_item(error): whether a read failed because something stands
# there that is no string: that is somebody's, and is neither overwritten nor taken for an item.
# newer(a, b): whether stamp a is larger than stamp b; both begin with 50 bytes of order tuple.
_COMMON: Final = """
local call = redis.call
local byte, sub, pack, unpack_bytes = string.byte, string.sub, struct.pack, struct.unpack
local function told(error)
  local text = tostring(type(error) == 'table' and error.err or error)
  -- Servers put the place in the script before it, some of them twice.
  local said = string.match(text, '^@?user_script: ?%d+: ?(.*)$')
  while said do
    text, said = said, string.match(said, '^@?user_script: ?%d+: ?(.*)$')
  end
  return text
end
local function not_an_item(error)
  return string.find(told(error), 'WRONGTYPE', 1, true) ~= nil
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

# KEYS and ARGV of every script that changes items. The ttl is the one that this process was configured
# with. Nothing is written where there is no marker: a Redis that came back empty would have a stream and
# no marker, and be taken for a foreign node. While a changed ttl is being brought in line both count,
# and tombstones are kept by the longer one.
_HEAD: Final = """
local stream, positions, marker, live_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local maxlen, grace, resolver, prefix = ARGV[1], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local tree, dirty = ARGV[6], ARGV[7]
local deleted = tree .. ':deleted'
local incarnation, announced_ttl, next_ttl, named_resolver = unpack(call('HMGET', marker,
  'incarnation', 'tombstone_ttl_ms', 'tombstone_ttl_next_ms', 'resolver'))
if not incarnation then return redis.error_reply('NOMARKER it is gone') end
if (next_ttl or announced_ttl) ~= ARGV[2] or named_resolver ~= resolver then
  return redis.error_reply('RECONFIGURED the marker names another ttl or resolver')
end
local ttl = math.max(tonumber(announced_ttl or next_ttl), tonumber(next_ttl or announced_ttl))
"""

# prepare() comes before the first change, and takes out of the tree some of what has expired. swap_leaf()
# puts a leaf in the place of another, false for none, put_back() undoes that, and count() notes what it
# means for the digests; sweep() takes out what has expired; fold() brings branches, root and the number
# of live items up to date. folded() returns what it is given to run returns, which is true for Lua, or the
# error it fails with, once what has changed until then is folded in. Branches count from 1 here, so that
# the root's digest lies at 0 and a branch's at 8 times its number.
_TREE: Final = """
local WORD = 4294967296
local root_high, root_low, live = 0, 0, 0
local highs, lows, touched = {}, {}, 0
local live_held, prepared, deletes = false, false, true
local function bump(at, high, low)
  local old = call('GETRANGE', tree, at, at + 7)
  if #old == 8 then
    local h, l = unpack_bytes('>I4I4', old)
    high, low = high + h, low + l
  end
  call('SETRANGE', tree, at, pack('>I4I4', high % WORD, low % WORD))
end
local function note(bucket, high, low)
  bump(1032 + bucket * 8, high, low)
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
-- Returns the order tuple and the digest of the leaf that was there, false and false for none.
local function swap_leaf(leaves, key, stamp, held)
  local old
  if not stamp then
    old = call('HGET', leaves, key)
    if old then call('HDEL', leaves, key) end
  elseif held ~= '' then
    if call('HSET', leaves, key, stamp) == 0 then return sub(held, 1, 50), sub(held, 51, 58) end
  elseif call('HSETNX', leaves, key, stamp) == 0 then
    -- Its item went away by itself, as an expired tombstone does after its grace.
    old = call('HGET', leaves, key)
    call('HSET', leaves, key, stamp)
  end
  if not old then return false, false end
  return old, digest_of(key, old)
end
local function put_back(leaves, key, old)
  if old then call('HSET', leaves, key, old) else call('HDEL', leaves, key) end
end
local function count(bucket, digest, old_digest)
  local high, low = 0, 0
  if digest then high, low = unpack_bytes('>I4I4', digest) end
  if old_digest then
    local old_high, old_low = unpack_bytes('>I4I4', old_digest)
    high, low = high - old_high, low - old_low
  end
  if digest or old_digest then note(bucket, high, low) end
end
local function remember(bucket, key, at)
  call('ZADD', deleted, string.format('%.0f', at), bucket .. ':' .. key)
end
local function sweep(now, most)
  local due = call('ZRANGEBYSCORE', deleted, '-inf', string.format('%.0f', now - ttl), 'LIMIT', 0,
    most)
  for _, member in ipairs(due) do
    local colon = string.find(member, ':', 1, true) or #member
    local bucket, key = sub(member, 1, colon - 1), sub(member, colon + 1)
    local stamp = redis.pcall('HGET', tree .. ':' .. bucket, key)
    local at = type(stamp) == 'string' and #stamp == 50 and byte(stamp, 17) == 1
      and unpack_bytes('>I8', stamp)
    if at and at + ttl > now then
      remember(bucket, key, at)
    else
      if at then
        call('HDEL', tree .. ':' .. bucket, key)
        count(bucket, nil, digest_of(key, stamp))
      end
      call('ZREM', deleted, member)
    end
  end
  return #due
end
local function prepare(now)
  if prepared then return end
  live_held = call('GET', live_key)
  if live_held and not tonumber(live_held) then error('ERR ' .. live_key .. ' is no number', 0) end
  -- This one comes first: what needs memory is refused only as long as nothing was written.
  call('SET', live_key, '0', live_held and 'NX' or 'XX')
  if dirty ~= '' then call('ZADD', dirty, 'XX', 0, '') end
  if tree ~= '' then
    call('SETRANGE', tree, 0, '')
    call('HDEL', tree .. ':0', '')
    if deletes then
      call('ZADD', deleted, 'XX', 0, '')
      sweep(now, 16)
    end
  end
  prepared = true
end
local function fold()
  if live ~= 0 then
    call('SET', live_key, string.format('%.0f', (tonumber(live_held) or 0) + live))
  end
  if touched == 0 then return end
  for branch, high in pairs(highs) do
    root_high, root_low = root_high + high, root_low + lows[branch]
  end
  if touched < 8 then
    for branch, high in pairs(highs) do bump(branch * 8, high, lows[branch]) end
    bump(0, root_high, root_low)
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
local function folded(work, ...)
  local fine, result = pcall(work, ...)
  fold()
  return fine and result or redis.error_reply(told(result))
end
"""

# keep(): writes an item, its leaf and its stream entry, and marks its key where a publisher of the
# dotted layout waits for that (``dirty``); it happens whole or not at all. ``expiry`` is given for a
# tombstone only. Returns how many more live items there are: 1, 0 or -1.
_KEEP: Final = """
local function publish(leaves, key, old, ...)
  local entry = redis.pcall('XADD', stream, 'MAXLEN', '~', maxlen, '*', ...)
  if type(entry) == 'table' then
    if leaves then put_back(leaves, key, old) end
    error(entry, 0)
  end
end
local function keep(bucket, item_key, key, value, held, digest, meta, expiry, now)
  prepare(now)
  local leaves, stamp, old, old_digest = nil, false, false, false
  if tree ~= '' then
    leaves = tree .. ':' .. bucket
    if not (expiry and expiry <= now) then stamp = sub(value, 1, 50) end
    old, old_digest = swap_leaf(leaves, key, stamp, held)
  end
  if expiry then
    publish(leaves, key, old, 'op', 'DEL', 'key', key, 'meta', meta)
    call('SET', item_key, value, 'PXAT', string.format('%.0f', math.max(expiry, now) + grace))
  else
    publish(leaves, key, old, 'op', 'PUT', 'key', key, 'hash', digest,
      'data', sub(value, 60 + byte(value, 59)), 'meta', meta)
    call('SET', item_key, value)
  end
  local more = (expiry and 0 or 1) - (held ~= '' and byte(held, 17) == 0 and 1 or 0)
  live = live + more
  if leaves then
    count(bucket, stamp and sub(value, 51, 58), old_digest)
    if expiry and stamp then remember(bucket, key, expiry - ttl) end
  end
  if dirty ~= '' then call('ZADD', dirty, 0, key) end
  return more
end
"""

# The copy of the marker says whose the data is, and what it is called, where the marker alone is lost.
# prepare_copy() comes before the first change: it fails where something else stands there.
_MARKER_COPY: Final = """
local copy = marker .. ':copy'
local function prepare_copy()
  call('HDEL', copy, 'tombstone_ttl_next_ms', 'tombstone_ttl_low_ms')
end
local function keep_copy()
  call('HSET', copy, unpack(call('HGETALL', marker)))
end
"""

# KEYS: marker, processes, stream. ARGV: node id, format, ttl in ms, resolver, new incarnation, layouts and
# partitions of a Redis that is empty (there is nothing to plant, and no reader must find it without a
# tree), this process's name, how long that counts in ms, tree, live.
# Returns "", the incarnation, the layouts that are published, 1 where expiries have to be brought in line,
# the shortest ttl until then, and what the marker says of an earlier one; or, of a Redis that is not ours,
# the field that differs and its value; or, where another process of the node runs with other values, that
# field and value.
OPEN: Final = (
    _COMMON
    + """
local marker, processes, ttl = KEYS[1], KEYS[2], ARGV[3]
"""
    + _MARKER_COPY
    + """
local has_data = call('EXISTS', ARGV[10], ARGV[11]) > 0
local layouts, partitions = unpack(call('HMGET', marker, 'layouts', 'partitions'))
local is_lost = call('HEXISTS', marker, 'incarnation') == 0
  and (has_data or call('EXISTS', KEYS[3]) == 1)
local node_id, format, announced, next_ttl, low, resolver, incarnation, was, changed_at = unpack(
  call('HMGET', is_lost and copy or marker, 'node_id', 'format', 'tombstone_ttl_ms',
  'tombstone_ttl_next_ms', 'tombstone_ttl_low_ms', 'resolver', 'incarnation',
  'tombstone_ttl_was_ms', 'tombstone_ttl_changed_ms'))
if node_id and node_id ~= ARGV[1] then return {'node_id', node_id} end
if format and tonumber(format) > tonumber(ARGV[2]) then return {'format', format} end
local now = now_ms()
local others = call('ZCOUNT', processes, string.format('(%.0f', now), '+inf')
local mine = call('ZSCORE', processes, ARGV[8])
if mine and tonumber(mine) > now then others = others - 1 end
if others > 0 then
  if announced and (next_ttl or announced) ~= ttl then
    return {'running', 'tombstone_ttl_ms', next_ttl or announced}
  end
  if resolver and resolver ~= ARGV[4] then return {'running', 'resolver', resolver} end
end
local is_empty = call('DBSIZE') == 0
incarnation = incarnation or ARGV[5]
layouts = layouts or (is_empty and ARGV[6]) or ''
partitions = partitions or (is_empty and ARGV[7]) or '0'
-- A set of before, by which nothing is swept any more: the tree is built anew.
if call('EXISTS', ARGV[10] .. ':expiring') == 1 then
  layouts, partitions = string.gsub(layouts, 'own,?', ''), '0'
end
local fields = {'node_id', ARGV[1], 'format', ARGV[2], 'resolver', ARGV[4], 'incarnation',
  incarnation, 'layouts', layouts, 'partitions', partitions}
local function set(name, value)
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
if is_lost and announced then
  set('tombstone_ttl_ms', announced)
  if next_ttl then set('tombstone_ttl_next_ms', next_ttl) end
  if low then set('tombstone_ttl_low_ms', low) end
  if was then set('tombstone_ttl_was_ms', was) end
  if changed_at then set('tombstone_ttl_changed_ms', changed_at) end
end
if not announced then
  -- By which ttl the data was kept, if there is any, nobody can tell.
  announced = ttl
  set('tombstone_ttl_ms', ttl)
  if has_data then next_ttl = ttl end
end
if (next_ttl or announced) ~= ttl or (next_ttl and not low) then
  low = math.min(tonumber(low or announced), tonumber(next_ttl or ttl), tonumber(ttl))
  next_ttl = ttl
  set('tombstone_ttl_next_ms', ttl)
  set('tombstone_ttl_low_ms', string.format('%.0f', low))
end
call('ZADD', processes, 'XX', 0, '')
prepare_copy()
call('HSET', marker, unpack(fields))
keep_copy()
call('ZREMRANGEBYSCORE', processes, '-inf', string.format('%.0f', now))
call('ZADD', processes, string.format('%.0f', now + tonumber(ARGV[9])), ARGV[8])
return {'', incarnation, layouts, next_ttl and 1 or 0, string.format('%.0f', low or announced),
  was or '', changed_at or ''}
"""
)

# KEYS: as every script that changes items, and processes. ARGV: the same, and this process's name and how
# long it counts in ms. Says that this process is alive.
BEAT: Final = (
    _COMMON
    + _HEAD
    + """
local until_ms = now_ms() + tonumber(ARGV[9])
return call('ZADD', KEYS[5], string.format('%.0f', until_ms), ARGV[8])
"""
)

# KEYS: processes. ARGV: this process's name. Says that this process is gone.
LEAVE: Final = "return redis.call('ZREM', KEYS[1], ARGV[1])"

# ARGV after the head: peer id, position, the incarnation that is meant or '', then key, value, digest in hex,
# meta, bucket for each item. An empty position is not kept. Returns one code per item (0 applied,
# 1 superseded, 2 refused: what is held is no item, 4 refused: the dotted layout keeps its own under that
# name) as a string, the live items deleted, and the keys that came to life.
# The loop is one protected call and not one for each item, which would cost a fifth of the script:
# where a read fails on a key of a wrong type, that item is refused and the loop goes on after it.
_APPLY: Final = (
    _COMMON
    + _HEAD
    + _TREE
    + _KEEP
    + """
local peer, position, meant = ARGV[8], ARGV[9], ARGV[10]
if meant ~= '' and incarnation ~= meant then
  return redis.error_reply('NOMARKER it is another one')
end
local now = now_ms()
local codes, counted, live_deleted, live_added = {}, 0, 0, 0
local at, reading = 11, false
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
        local more = keep(
          ARGV[i + 4], item_key, key, value, held, ARGV[i + 2], ARGV[i + 3], expiry, now)
        if more < 0 then live_deleted = live_deleted + 1 end
        if more > 0 then live_added = live_added + 1 end
      end
    end
    counted = counted + 1
    codes[counted] = code
  end
  at = #ARGV + 1
end
-- The position comes first, because it can be put back.
local before, is_placed
local function place()
  prepare(now)
  before = call('HGET', positions, peer)
  if not before then call('HDEL', positions, peer) end
  call('HSET', positions, peer, position)
  is_placed = true
end
local fine, why = true, nil
if position ~= '' then fine, why = pcall(place) end
while fine and at <= #ARGV do
  fine, why = pcall(run)
  if not fine and reading and not_an_item(why) then
    fine, reading = true, false
    counted = counted + 1
    codes[counted] = '2'
    at = at + STRIDE
  end
end
fold()
if not fine then
  if is_placed then put_back(positions, peer, before) end
  return redis.error_reply(told(why))
end
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
    error(held, 0)
  end
  if held ~= '' and #held < 58 then return false end
  return held
end
-- In an error a line's end would become a space.
local function hex(text)
  return (string.gsub(text, '.', function(one) return string.format('%02x', byte(one)) end))
end
local LIMIT = 9007199254740991
-- The time decides first, so a version that cannot go up any more hinders nothing. Where what is held
-- lies a day ahead, peers would refuse a write over it.
local function next_stamp(key, held, now)
  if held == '' then return now, 1 end
  local at, version = unpack_bytes('>I8I8', held)
  if at > now + 86400000 then error(string.format('AHEAD %.0f ', at) .. hex(key), 0) end
  return math.max(now, at + 1), math.min(version + 1, LIMIT)
end
"""

# ARGV after the head, for each item: key, hash and type as bytes, origin and data as bytes, digest in hex,
# head of meta, tail of meta, bucket. Returns updated_at and version of each as text.
PUT: Final = (
    _COMMON
    + _HEAD
    + _TREE
    + _KEEP
    + _NEXT
    + """
local out, now = {}, now_ms()
deletes = false
local function put(i)
  local key = ARGV[i]
  local item_key = prefix .. key
  local held = held_head(item_key)
  if not held then error('NOITEM ' .. key, 0) end
  local at, version = next_stamp(key, held, now)
  local stamp = pack('>I8I8B', at, version, 0) .. ARGV[i + 1]
  local value = stamp .. digest_of(key, stamp) .. ARGV[i + 2]
  local at_text, version_text = string.format('%.0f', at), string.format('%.0f', version)
  local meta = ARGV[i + 4] .. version_text .. ',"updated_at":' .. at_text .. ARGV[i + 5]
  keep(ARGV[i + 6], item_key, key, value, held, ARGV[i + 3], meta, nil, now)
  out[#out + 1] = at_text
  out[#out + 1] = version_text
end
return folded(function()
  for i = 8, #ARGV, 7 do put(i) end
  return out
end)
"""
)

# ARGV after the head: key, hash and type as bytes, origin as bytes, tail of meta, bucket. Returns 1 if there
# was a live item, else 0.
DELETE: Final = (
    _COMMON
    + _HEAD
    + _TREE
    + _KEEP
    + _NEXT
    + """
local key, now = ARGV[8], now_ms()
return folded(function()
  local item_key = prefix .. key
  local held = held_head(item_key)
  if not held then error('NOITEM ' .. key, 0) end
  if held == '' or byte(held, 17) == 1 then return 0 end
  local at, version = next_stamp(key, held, now)
  local stamp = pack('>I8I8B', at, version, 1) .. ARGV[9]
  local value = stamp .. digest_of(key, stamp) .. ARGV[10]
  local meta = '{"version":' .. string.format('%.0f', version)
    .. ',"updated_at":' .. string.format('%.0f', at) .. ARGV[11]
  keep(ARGV[12], item_key, key, value, held, '', meta, at + ttl, now)
  return 1
end)
"""
)

# ARGV after the head: how many at most, and '' or 'announced' for the ttl that is announced, where another
# is to come. Takes expired tombstones out of the tree; returns how many it looked at.
SWEEP: Final = (
    _COMMON
    + _HEAD
    + _TREE
    + """
if ARGV[9] ~= '' then ttl = tonumber(announced_ttl or next_ttl) end
return folded(sweep, now_ms(), tonumber(ARGV[8]))
"""
)

# adopt(): plants the leaf of what is held if it belongs into the tree and is missing.
_ADOPT: Final = """
local function adopt(bucket, key, held, now)
  local stamp, leaves = sub(held, 1, 50), tree .. ':' .. bucket
  local at = byte(stamp, 17) == 1 and unpack_bytes('>I8', stamp)
  if at and at + ttl <= now then return end
  prepare(now)
  if call('HSETNX', leaves, key, stamp) == 1 then
    local digest = digest_of(key, stamp)
    count(bucket, digest)
    -- What was written without a tree has no digest yet.
    if sub(held, 51, 58) ~= digest then call('SETRANGE', prefix .. key, 50, digest) end
  end
  if at then remember(bucket, key, at) end
end
"""

# ARGV after the head: key and bucket of items. Plants the leaves that are missing; returns how many keys
# held no item.
BUILD: Final = (
    _COMMON
    + _HEAD
    + _TREE
    + _NEXT
    + _ADOPT
    + """
local now, skipped = now_ms(), 0
return folded(function()
  for i = 8, #ARGV, 2 do
    local held = held_head(prefix .. ARGV[i])
    if not held or held == '' then
      skipped = skipped + 1
    else
      adopt(ARGV[i + 1], ARGV[i], held, now)
    end
  end
  return skipped
end)
"""
)

# ARGV after the head: key and bucket of items. Has the tombstones among them kept by the ttl that is to be
# announced, and returns those to the tree that had left it by a shorter one; returns how many there were.
REALIGN: Final = (
    _COMMON
    + _HEAD
    + _TREE
    + _NEXT
    + _ADOPT
    + """
local now, found, wanted = now_ms(), 0, tonumber(ARGV[2])
return folded(function()
  for i = 8, #ARGV, 2 do
    local key = ARGV[i]
    local held = held_head(prefix .. key)
    if held and held ~= '' and byte(held, 17) == 1 then
      found = found + 1
      local expiry = unpack_bytes('>I8', held) + wanted
      if tree ~= '' then adopt(ARGV[i + 1], key, held, now) end
      call('PEXPIREAT', prefix .. key, string.format('%.0f', math.max(expiry, now) + grace))
    end
  end
  return found
end)
"""
)

# ARGV: the head. Announces the ttl by which all tombstones are kept by now, with what is known of deletes
# at this moment: no longer back than any ttl since the one that was announced before. Returns what the
# marker says of an earlier ttl.
ANNOUNCE: Final = (
    _COMMON
    + _HEAD
    + _MARKER_COPY
    + """
local low, was, changed_at = unpack(call('HMGET', marker, 'tombstone_ttl_low_ms',
  'tombstone_ttl_was_ms', 'tombstone_ttl_changed_ms'))
if next_ttl then
  local now = now_ms()
  local known = math.min(tonumber(announced_ttl), tonumber(low or announced_ttl))
  if was then known = math.min(known, tonumber(was) + math.max(0, now - tonumber(changed_at))) end
  was, changed_at = string.format('%.0f', known), string.format('%.0f', now)
  prepare_copy()
  call('HSET', marker, 'tombstone_ttl_ms', next_ttl, 'tombstone_ttl_was_ms', was,
    'tombstone_ttl_changed_ms', changed_at)
  call('HDEL', marker, 'tombstone_ttl_next_ms', 'tombstone_ttl_low_ms')
  keep_copy()
end
return {was or '', changed_at or ''}
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
call('SETRANGE', tree, 0, '')
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
