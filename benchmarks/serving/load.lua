-- Sends the bodies of a folder in turn, so that no two requests in a row are the same, and prints what it counted.
--
--     wrk ... -s load.lua URL -- FOLDER COUNT
--
-- FOLDER holds `headers` (one "Name: value" a line) and the bodies 0, 1, ... COUNT - 1.

local requests, sent = {}, 0

local function content(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read("*a")
  file:close()
  return text
end

function init(arguments)
  local folder, count = arguments[1], tonumber(arguments[2])
  local headers = {}
  for name, value in content(folder .. "/headers"):gmatch("([^:\n]+): ([^\n]+)") do
    headers[name] = value
  end
  headers["Host"] = wrk.headers["Host"]
  for i = 0, count - 1 do
    requests[i] = wrk.format("POST", nil, headers, content(folder .. "/" .. i))
  end
  requests.count = count
end

function request()
  sent = sent + 1
  return requests[sent % requests.count]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "p999_us": %d, "non_2xx": %d, "socket_errors": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
    errors.status, errors.connect + errors.read + errors.write + errors.timeout
  ))
end
