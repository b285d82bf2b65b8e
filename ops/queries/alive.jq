# Is it alive? The last sign of life in the log, and how the process ended if it did.
#   jq -nR -f alive.jq worker.log
[inputs | fromjson? | objects | select(.event == "start" or .event == "heartbeat" or .event == "stop" or .event == "fatal")]
| {
    last: (last | {timestamp, event}),
    starts: map(select(.event == "start")) | length,
    version: (map(select(.event == "start")) | last | .version),
    poll_age_ms: (map(select(.event == "heartbeat")) | last | .poll_age_ms),
    ended: (last | .event == "stop" or .event == "fatal"),
    fatal: (map(select(.event == "fatal") | .error) | last)
  }
