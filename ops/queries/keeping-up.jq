# Is it keeping up? The last word on lag, and where the time of all commits went.
#   jq -nR -f keeping-up.jq worker.log
[inputs | fromjson? | objects | select(.event == "lag" or .event == "batch.done")]
| map(select(.event == "batch.done")) as $commits
| (map(select(.event == "lag")) | last) as $lag
| {
    lag: (if $lag == null or ($lag.known | not) then "unknown" else $lag.durable end),
    commits: ($commits | length),
    ok: ($commits | map(.ok) | add // 0),
    image_bytes: ($commits | map(.image_bytes) | add // 0),
    fetch_ms: ($commits | map(.fetch_ms) | add // 0),
    decode_ms: ($commits | map(.decode_ms) | add // 0),
    embed_ms: ($commits | map(.embed_ms) | add // 0),
    commit_ms: ($commits | map(.commit_ms) | add // 0),
    oldest_event_ms: ($commits | map(.age_ms | numbers) | max)
  }
