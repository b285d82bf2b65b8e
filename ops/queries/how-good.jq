# How good is it? What queries found and how long they took.
#   jq -nR -f how-good.jq query-worker.log
[inputs | fromjson? | objects | select(.event == "search" or .event == "search.slow" or .event == "shed" or .event == "http.error" or .event == "balance.watch")]
| map(select(.event == "search")) as $searches
| {
    searches: ($searches | length),
    slow: (map(select(.event == "search.slow")) | length),
    turned_away: (map(select(.event == "shed")) | length),
    failed: (map(select(.event == "http.error")) | length),
    moved_share: (if ($searches | map(.results) | add // 0) == 0 then null
                  else ($searches | map(.moved) | add) / ($searches | map(.results) | add) end),
    median_ms: ($searches | map(.text_ms + .wait_ms + .scan_ms + .rank_ms) | sort | if length == 0 then null else .[length / 2 | floor] end),
    empty: ($searches | map(select(.matched == 0)) | length),
    balance: (map(select(.event == "balance.watch")) | last | if . == null then null
              else {calibrated, queries, first_moved, no_match, hubness_ratio, drift} end),
    weights: ($searches | map({normaliser, weight}) | unique)
  }
