# Is it keeping up? The last known lag, and where the time of all commits went.
#   jq -nR -f keeping-up.jq worker.log
[inputs | fromjson? | objects | select(.event == "lag" or .event == "commit.succeeded")]
| map(select(.event == "commit.succeeded")) as $commits
| (map(select(.event == "lag")) | last) as $lag
| {
    state: $lag.state,
    lag: (if $lag == null or ($lag.end_offsets_known | not) then "unknown" else $lag.lag_messages end),
    commits: ($commits | length),
    ok: ($commits | map(.succeeded) | add // 0),
    image_bytes: ($commits | map(.image_bytes) | add // 0),
    fetch_ms: ($commits | map(.fetch_ms) | add // 0),
    decode_ms: ($commits | map(.decode_ms) | add // 0),
    embed_ms: ($commits | map(.embed_ms) | add // 0),
    commit_ms: ($commits | map(.commit_ms) | add // 0),
    oldest_event_ms: ($commits | map(.event_age_ms | numbers) | max)
  }
