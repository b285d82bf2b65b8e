# What is it losing? Events put aside or skipped, messages that Kafka removed, lines not written.
#   jq -nR -f losing.jq worker.log
[inputs | fromjson? | objects | select(.event != null)]
| map(select(.event == "batch.done")) as $commits
| {
    dead_lettered: ($commits | map(.dead_lettered) | add // 0),
    skipped: ($commits | map(.skipped) | add // 0),
    by_code: (map(select(.event == "dead_letter")) | group_by(.code) | map({(.[0].code): length}) | add // {}),
    lost: (map(select(.event == "source.gap") | .lost) | add // 0),
    cut_off: (map(select(.event == "drain.overdue") | .left) | add // 0),
    lines_held_back: (map(select(.event == "log.held_back") | .count) | add // 0)
  }
