# What is it losing? Events that were dead-lettered or had no image, messages that Kafka removed, lines not written.
#   jq -nR -f losing.jq worker.log
[inputs | fromjson? | objects | select(.event != null)]
| map(select(.event == "commit.succeeded")) as $commits
| {
    dead_lettered: ($commits | map(.dead_lettered) | add // 0),
    skipped: ($commits | map(.not_found) | add // 0),
    by_code: (map(select(.event == "dead_letter")) | group_by(.code) | map({(.[0].code): length}) | add // {}),
    lost: (map(select(.event == "source.data_loss" or .event == "source.log_replaced") | .lost_messages | numbers) | add // 0),
    replaced_logs: (map(select(.event == "source.log_replaced")) | length),
    cut_off: (map(select(.event == "drain.timed_out") | .remaining) | add // 0),
    lines_held_back: (map(select(.event == "log.suppressed") | .count) | add // 0)
  }
