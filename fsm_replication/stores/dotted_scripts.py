"""The Lua scripts that keep the dotted layout in a node's Redis, for foreign readers.

One process of a node at a time holds a lease and changes the tree; each script looks at the lease
first, so one that was away for too long changes nothing more.
"""

from __future__ import annotations

from typing import Final

__all__ = ("FOLD", "LEASE", "NOT_MINE", "PUBLISH", "RELEASE", "RENEW")

NOT_MINE: Final = "NOLEASE"

# KEYS: lease. ARGV: token, milliseconds. Returns 1 where the lease is held now.
LEASE: Final = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

# KEYS: lease. ARGV: token, milliseconds. Unlike LEASE it never takes the lease anew: what was read
# before it was lost may be out of date.
RENEW: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('NOLEASE') end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# KEYS: lease. ARGV: token.
RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""

# dirty: keys whose leaf is not up to date. unfolded: nodes whose hash is not, by their depth.
# out: live keys that the tree cannot hold.
_COMMON: Final = """
local call = redis.call
local prefix = ARGV[2]
local dirty, unfolded = prefix .. 'fsm:dotted:dirty', prefix .. 'fsm:dotted:unfolded'
local out = prefix .. 'fsm:dotted:out'
local hashes, children = prefix .. 'merkle:hash:', prefix .. 'merkle:children:'
if call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('NOLEASE') end
local function split(path)
  local parent, segment = string.match(path, '^(.*)%.([^.]*)$')
  return parent or '', segment or path
end
local function depth(path)
  if path == '' then return 0 end
  local _, dots = string.gsub(path, '%.', '')
  return dots + 1
end
local function unfold(path) call('ZADD', unfolded, depth(path), path) end
-- Where a live key is a node from now on, the tree cannot hold it.
local function keep_out(path)
  local deleted = redis.pcall('GETRANGE', prefix .. 'item:' .. path, 16, 16)
  if deleted == '\\0' then call('SADD', out, path) end
end
-- What is left to be done is noted before anything is done, so that it is not lost if the script fails.
local function replace(path, old, new)
  local parent, segment = split(path)
  unfold(parent)
  if old then call('ZREM', children .. parent, segment .. ':' .. old) end
  if new then
    call('ZADD', children .. parent, 0, segment .. ':' .. new)
    call('SET', hashes .. path, new)
  else
    call('DEL', hashes .. path)
  end
end
"""

# KEYS: lease. ARGV: token, prefix, then for each item: key, order tuple as it was read ('' for no
# item), foreign form ('' where there is no live item), hash of the leaf in hex ('' for none).
PUBLISH: Final = (
    _COMMON
    + """
for i = 3, #ARGV, 4 do
  local key, stamp, value, leaf = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  if value ~= '' then call('SET', prefix .. key, value) else call('DEL', prefix .. key) end
  local old = call('GET', hashes .. key)
  local kept_out = value ~= ''
  if call('ZCARD', children .. key) == 0 then
    if leaf ~= '' then
      kept_out = false
      if old ~= leaf then
        -- What was a leaf above this one is a node from now on.
        local above = split(key)
        while above ~= '' and call('ZCARD', children .. above) == 0 do
          keep_out(above)
          above = split(above)
        end
        replace(key, old, leaf)
      end
    elseif old then
      replace(key, old, nil)
    end
  end
  call(kept_out and 'SADD' or 'SREM', out, key)
  -- Where it has changed since it was read, it stays to be done again.
  local held = redis.pcall('GETRANGE', prefix .. 'item:' .. key, 0, 49)
  if type(held) == 'table' then held = '' end
  if held == stamp then call('ZREM', dirty, key) end
end
return 1
"""
)

# KEYS: lease. ARGV: token, prefix, then path and hash in hex of nodes ('' for one that is empty).
FOLD: Final = (
    _COMMON
    + """
for i = 3, #ARGV, 2 do
  local path, digest = ARGV[i], ARGV[i + 1]
  local old = call('GET', hashes .. path)
  if path == '' then
    call('SET', hashes, digest)
  elseif digest == '' then
    if old then replace(path, old, nil) end
    -- A key that this node kept out may come in now.
    if call('SISMEMBER', out, path) == 1 then call('ZADD', dirty, 0, path) end
  elseif old ~= digest then
    -- A key above may have been published since the one below was, and before this node was there.
    local above = split(path)
    if above ~= '' and call('ZCARD', children .. above) == 0 then keep_out(above) end
    replace(path, old, digest)
  end
  call('ZREM', unfolded, path)
end
return 1
"""
)
