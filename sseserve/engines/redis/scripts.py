"""What Redis executes in one step, in Lua, and the names of the keys.

The keys of a session share a hash tag, so they are on one node of a Cluster:

- ``sseserve:{ID}:log``, a hash: ``record`` (JSON; its epoch may be an older one), ``epoch``, ``seq`` and
  ``first`` (the oldest event kept), ``size`` and ``receipts_size`` (bytes, see ``Event.weight``), until when
  it is kept (``touched``, ``keep``, ``ended``), ``generation`` (under which it was last written), ``nonce``
  (of the last append)
- ``sseserve:{ID}:events``, a stream: the entry ``SEQ-0`` has an event (``e``), its size (``w``) and the nonce
  of its append (``n``), by which one differs from another that took its place after Redis had lost it
- ``sseserve:{ID}:receipts``, a hash: for each idempotency key ``COUNT:SIZE:RECEIPT``
- ``sseserve:{ID}:order``, a sorted set: the idempotency keys in the order in which they came
- ``sseserve:{ID}:live``, the channel

Those that lead to the sessions share another tag: ``sseserve:{index}:sessions`` by the time of creation,
``:leased`` and ``:jobs`` by the time of being noted, ``:due`` by the time of the next check, and
``:owner:OWNER`` those of an owner by the time of creation. An entry is made before the session is stored, so
it may lead to none. ``:lineage`` exists everywhere but in a Cluster.

Generation: ``master_replid`` changes when Redis restarts, when a replica is promoted, and when one follows
for the first time. The lineage has that of the running server, and those before it after which nothing can
have been lost: of the same process, or of one that had ``appendfsync always`` and was restarted. With
``everysec`` Redis acknowledges what it writes up to two seconds later, and a process that is killed loses
that. A log that was last written under another generation gets a new epoch.
"""

from __future__ import annotations

from .client import Script

__all__ = [
    "APPEND",
    "DUE",
    "DUE_KEY",
    "EXPIRE",
    "INDEX",
    "JOBS_KEY",
    "LEASED_KEY",
    "LINEAGE",
    "LINEAGE_KEY",
    "NOTE",
    "OWNER_KEY",
    "PROBE",
    "PROBE_CHANNEL",
    "READ",
    "REMOVE",
    "RENEW",
    "SESSIONS_KEY",
    "UPDATE",
    "ChannelNames",
    "session_keys",
]

SESSIONS_KEY, LEASED_KEY, JOBS_KEY, DUE_KEY = INDEX = tuple(
    "sseserve:{index}:" + name for name in ("sessions", "leased", "jobs", "due")
)
LINEAGE_KEY = "sseserve:{index}:lineage"
OWNER_KEY = "sseserve:{index}:owner:"
ALL_CHANNEL = "sseserve:all"
PROBE_CHANNEL = "sseserve:probe"  # nobody reads it
MARGIN = 86400  # seconds for which Redis keeps what no instance has deleted


def _prefix(session_id: str) -> str:
    return f"sseserve:{{{session_id.replace('}', '%7D')}}}:"  # % cannot be in an id


def session_keys(session_id: str) -> tuple[str, str, str, str]:
    """Return the keys of a session: its log, events, receipts, and the order of these."""
    prefix = _prefix(session_id)
    return prefix + "log", prefix + "events", prefix + "receipts", prefix + "order"


class ChannelNames:
    """The channels of a database: other than keys, all databases of a server have the same."""

    def __init__(self, db: int) -> None:
        self._prefix = f"{db}:" if db else ""
        self.pattern = self._prefix + "sseserve:*:live"  # those of all sessions
        self.all = ALL_CHANNEL  # instead in a Cluster, whose shard channels have no patterns

    def of(self, session_id: str) -> str:
        """Return the channel on which a session's events are published."""
        return f"{self._prefix}{_prefix(session_id)}live"


# The shebang has Redis refuse a script as a whole when memory or disk are full, instead of in the middle.
_STORES, _READS, _FREES = "#!lua", "#!lua flags=no-writes", "#!lua flags=allow-oom"

_CONSTANTS = f"""
local margin, all_sessions = {MARGIN}, '{ALL_CHANNEL}'
"""

# The first argument of a script that needs the time is the time in seconds, empty for that of the server.
_NOW = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
"""

_GENERATION = """
local info = redis.call('INFO', 'replication')
local generation = string.match(info, 'master_replid:(%x+)')

local function enter_lineage(lineage)
  local newest, process, keeps_all = unpack(redis.call('HMGET', lineage, 'newest', 'process', 'keeps_all'))
  if newest == generation then return end
  local promoted = not string.find(info, 'master_replid2:0000000000', 1, true)
  local running = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local from_file = string.find(redis.call('INFO', 'persistence'), 'aof_enabled:1', 1, true)
  local complete = running == process or (from_file and keeps_all == '1')
  if promoted or not complete then redis.call('DEL', lineage) end
  redis.call('HSET', lineage, 'newest', generation, 'process', running, generation, 1)
end

local function renew(log, channel, publish, head, epoch, new, seq)
  redis.call('HSET', log, 'epoch', new, 'generation', generation)
  local nonce = redis.call('HGET', log, 'nonce')
  local message = string.format('%s"%s",%d,"%s","%s"]', head, new, seq, epoch, nonce)
  redis.call(publish, channel, message)
  if publish == 'SPUBLISH' then redis.call('PUBLISH', all_sessions, message) end
end
"""


def _script(*parts: str) -> Script:
    return Script("\n".join(parts))


# KEYS: lineage; ARGV: "1" if the server keeps all that it has acknowledged when its process is killed
LINEAGE = _script(
    _STORES,
    _CONSTANTS,
    _GENERATION,
    "enter_lineage(KEYS[1])\nredis.call('HSET', KEYS[1], 'keeps_all', ARGV[1])",
)

# KEYS: log, events, receipts, order, and the lineage except in a Cluster
# ARGV: as they are unpacked below, then of each event its size and content
# Returns {"stored", last seq before, its nonce}, {"repeated", receipt}, {"stale", epoch, seq, record, nonce}
APPEND = _script(
    _STORES,
    _NOW,
    _CONSTANTS,
    _GENERATION,
    """
local log, stream, receipts, order, lineage = unpack(KEYS)
local _, renewal_head, channel, publish, -- of messages
  epoch, from, last, replaces, -- the last is an epoch, or empty
  builds_on, nonce, -- the append that this one follows (empty: any), and this one
  max_events, max_bytes, max_receipts, record, keep, ended, head, max_message,
  receipt_key, count, receipt_size, receipt -- without a receipt the count is 0
  = unpack(ARGV, 1, 22)
from, last, count = tonumber(from), tonumber(last), tonumber(count)
max_events, max_bytes, max_receipts = tonumber(max_events), tonumber(max_bytes), tonumber(max_receipts)

local fields = redis.call('HMGET', log,
  'epoch', 'seq', 'generation', 'first', 'size', 'receipts_size', 'keep', 'kept_at', 'nonce')
local stored_epoch, seq, first = fields[1], tonumber(fields[2]), tonumber(fields[4])
local size, receipts_size = tonumber(fields[5]) or 0, tonumber(fields[6]) or 0

if stored_epoch and fields[3] ~= generation then
  local continued = false
  if lineage then
    enter_lineage(lineage)
    continued = redis.call('HEXISTS', lineage, fields[3]) == 1
  end
  if not continued then
    renew(log, channel, publish, renewal_head, stored_epoch, nonce, seq)
    stored_epoch = nonce
  end
end

local earlier = count > 0 and redis.call('HGET', receipts, receipt_key)
local earlier_count, earlier_size
if earlier then
  earlier_count, earlier_size = string.match(earlier, '^(%d+):(%d+):')
  if tonumber(earlier_count) >= count then return {'repeated', earlier} end
end

local begins = not stored_epoch or replaces ~= ''
local is_stale
if begins then
  is_stale = from ~= 1 or replaces ~= (stored_epoch or '')
else
  is_stale = stored_epoch ~= epoch or seq ~= from - 1
end
if builds_on ~= '' and builds_on ~= fields[9] then is_stale = true end
if is_stale then
  local stored = stored_epoch and redis.call('HGET', log, 'record') or ''
  return {'stale', stored_epoch or '', seq or 0, stored, fields[9] or ''}
end

if begins then
  redis.call('DEL', stream)
  size, first = receipts_size, 1
end
local events = {}
for index = 23, #ARGV, 2 do
  local number = from + (index - 23) / 2
  redis.call('XADD', stream, string.format('%d-0', number),
    'w', ARGV[index], 'e', ARGV[index + 1], 'n', nonce)
  size = size + tonumber(ARGV[index])
  events[#events + 1] = ARGV[index + 1]
end

local has_receipts = false
if count > 0 then
  if earlier then
    receipts_size, size = receipts_size - tonumber(earlier_size), size - tonumber(earlier_size)
  end
  receipts_size, size = receipts_size + tonumber(receipt_size), size + tonumber(receipt_size)
  redis.call('HSET', receipts, receipt_key, count .. ':' .. receipt_size .. ':' .. receipt)
  redis.call('ZADD', order, redis.call('HINCRBY', log, 'receipts', 1), receipt_key)
  local stored = redis.call('ZCARD', order)
  has_receipts = stored == 1
  while stored > 1 and (stored > max_receipts or receipts_size > math.floor(max_bytes / 4)) do
    local oldest = redis.call('ZPOPMIN', order)[1]
    local freed = tonumber(string.match(redis.call('HGET', receipts, oldest) or '0:0:', '^%d+:(%d+):'))
    redis.call('HDEL', receipts, oldest)
    receipts_size, size, stored = receipts_size - freed, size - freed, stored - 1
  end
end

local oldest = first
while last > first and (last - first + 1 > max_events or size > max_bytes) do
  local excess = math.max(4, math.min(last - first + 1 - max_events, 100))
  local from_first = string.format('%d-0', first)
  local entries = redis.call('XRANGE', stream, from_first, '+', 'COUNT', excess)
  if #entries == 0 then first = last end -- somebody has deleted them
  for _, entry in ipairs(entries) do
    if last > first and (last - first + 1 > max_events or size > max_bytes) then
      size, first = size - tonumber(entry[2][2]), first + 1
    end
  end
end
if first > oldest then redis.call('XTRIM', stream, 'MINID', string.format('%d-0', first)) end

redis.call('HSET', log, 'record', record, 'epoch', epoch, 'seq', last, 'generation', generation,
  'first', first, 'size', size, 'receipts_size', receipts_size,
  'touched', string.format('%.6f', now), 'keep', keep, 'ended', ended, 'nonce', nonce)
if begins or has_receipts or fields[7] ~= keep or now - (tonumber(fields[8]) or 0) > 3600 then
  redis.call('HSET', log, 'kept_at', string.format('%.6f', now))
  for index = 1, 4 do redis.call('EXPIRE', KEYS[index], math.ceil(tonumber(keep)) + margin) end
end

local message = string.format('%s"%s",%d,"%s"', head, nonce, seq or 0, fields[9] or '')
local payload = ',' .. record .. ',[' .. table.concat(events, ',') .. ']]'
if #payload > tonumber(max_message) then
  redis.call(publish, channel, message .. ']')
else
  redis.call(publish, channel, message .. payload)
end
-- In a Cluster shard channels cannot be subscribed to by pattern.
if publish == 'SPUBLISH' then redis.call('PUBLISH', all_sessions, message .. ']') end
return {'stored', seq or 0, fields[9] or ''}
""",
)

# KEYS: log, events; ARGV: after which seq, how many
# Returns {record, epoch, first, nonce, entries, nonce of the event at "after", if it is kept}, or nil.
READ = _script(
    _READS,
    """
local fields = redis.call('HMGET', KEYS[1], 'record', 'epoch', 'first', 'nonce', 'seq')
if not fields[1] then return nil end
local entries, before = {}, {}
local first, last = tonumber(fields[3]), tonumber(fields[5])
if tonumber(ARGV[2]) > 0 then
  entries = redis.call('XRANGE', KEYS[2], string.format('%d-0', ARGV[1] + 1), '+', 'COUNT', ARGV[2])
  local wanted = math.max(ARGV[1] + 1, first)
  local found = entries[1] and tonumber(string.match(entries[1][1], '^%d+')) or last + 1
  if found > wanted then first = found end -- Redis has evicted events, or somebody has deleted them
end
if tonumber(ARGV[1]) > 0 then
  before = redis.call('XRANGE', KEYS[2], string.format('%d-0', ARGV[1]), string.format('%d-0', ARGV[1]))
end
return {fields[1], fields[2], first, fields[4], entries, before[1] and before[1][2][6] or ''}
""",
)

_REMOVE = """
local function remove(log, channel, publish, head, epoch)
  local record = redis.call('HGET', log, 'record')
  redis.call('DEL', unpack(KEYS))
  local message = string.format('%s"%s",', head, epoch) .. record .. ']'
  redis.call(publish, channel, message)
  if publish == 'SPUBLISH' then redis.call('PUBLISH', all_sessions, message) end
  return record
end
"""

# KEYS: log, events, receipts, order; ARGV: epoch, message head, channel, publish command
# Returns the record, or nil.
REMOVE = _script(
    _FREES,
    _CONSTANTS,
    _REMOVE,
    """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return nil end
return remove(KEYS[1], ARGV[3], ARGV[4], ARGV[2], ARGV[1])
""",
)

# KEYS: log, events, receipts, order
# ARGV: now, message head, channel, publish command, seconds for which being watched extends it (empty: it is
#       not watched), seconds before its end from which on it does
# Returns {"removed", epoch, record}, {"kept", until when} or {"none"}.
EXPIRE = _script(
    _FREES,
    _NOW,
    _CONSTANTS,
    _REMOVE,
    """
local fields = redis.call('HMGET', KEYS[1], 'epoch', 'touched', 'keep', 'ended')
if not fields[1] then return {'none'} end
local ends = tonumber(fields[2]) + tonumber(fields[3])
if ARGV[5] ~= '' and fields[4] == '0' and ends <= now + tonumber(ARGV[6]) then
  ends = now + tonumber(ARGV[5])
  redis.call('HSET', KEYS[1], 'kept_at', string.format('%.6f', now))
  for index = 1, 4 do
    redis.call('EXPIRE', KEYS[index], math.ceil(tonumber(fields[3]) + tonumber(ARGV[5])) + margin)
  end
end
if ends > now then return {'kept', string.format('%.6f', ends)} end
return {'removed', fields[1], remove(KEYS[1], ARGV[3], ARGV[4], ARGV[2], fields[1])}
""",
)

# KEYS: log, events; ARGV: message head, channel, publish command, epoch, seq, its nonce, new epoch
# If the log has this epoch, and does not have this event, it gets the new epoch. Returns 1 if so.
RENEW = _script(
    _FREES,
    _CONSTANTS,
    _GENERATION,
    """
local fields = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'first')
if fields[1] ~= ARGV[4] or tonumber(ARGV[5]) < tonumber(fields[3]) then return 0 end
local place = string.format('%d-0', ARGV[5])
local entry = redis.call('XRANGE', KEYS[2], place, place)[1]
if entry and entry[2][6] == ARGV[6] then return 0 end
renew(KEYS[1], ARGV[2], ARGV[3], ARGV[1], ARGV[4], ARGV[7], tonumber(fields[2]))
return 1
""",
)

# KEYS: any. It is refused when Redis cannot store.
PROBE = _script(_STORES, "return 1")

# KEYS: sessions, leased, jobs, due, and those of its owner if it is created and has one
# ARGV: now, id, seconds until its check, and "1" if it is created, if it has a lease, if it is a job; then
#       how many its owner may have, and for how many seconds that set of them is kept
# Returns 0 if its owner has so many; then nothing is noted.
NOTE = _script(
    _STORES,
    _NOW,
    """
local due, at = string.format('%.6f', now + tonumber(ARGV[3])), string.format('%.6f', now)
local owned = KEYS[5]
if owned then
  local is_full = redis.call('ZCARD', owned) >= tonumber(ARGV[7])
  if is_full and not redis.call('ZSCORE', owned, ARGV[2]) then return 0 end
  redis.call('ZADD', owned, at, ARGV[2])
  redis.call('EXPIRE', owned, ARGV[8])
end
if ARGV[4] == '1' then
  redis.call('ZADD', KEYS[1], at, ARGV[2])
  redis.call('ZADD', KEYS[4], due, ARGV[2])
else
  redis.call('ZADD', KEYS[1], 'NX', at, ARGV[2])
  redis.call('ZADD', KEYS[4], 'LT', due, ARGV[2])
end
if ARGV[5] == '1' then redis.call('ZADD', KEYS[2], at, ARGV[2]) end
if ARGV[6] == '1' then redis.call('ZADD', KEYS[3], at, ARGV[2]) end
return 1
""",
)

# KEYS: sorted sets of the index
# ARGV: id, and for each of them the score at which it is there (empty: leave it) and that which it gets
#       (empty: remove it). What has been noted since stays.
UPDATE = _script(
    _FREES,
    """
for index = 1, #KEYS do
  local score, new = ARGV[2 * index], ARGV[2 * index + 1]
  if score ~= '' and tonumber(redis.call('ZSCORE', KEYS[index], ARGV[1]) or '') == tonumber(score) then
    if new == '' then
      redis.call('ZREM', KEYS[index], ARGV[1])
    else
      redis.call('ZADD', KEYS[index], new, ARGV[1])
    end
  end
end
""",
)

# KEYS: due; ARGV: now, seconds by which the check of what is watched comes earlier
# Returns now, and of each session that is to be checked id and time, the earliest first.
DUE = _script(
    _READS,
    _NOW,
    """
local limit = string.format('%.6f', now + tonumber(ARGV[2]))
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', limit, 'WITHSCORES', 'LIMIT', 0, 4096)
return {string.format('%.6f', now), due}
""",
)
