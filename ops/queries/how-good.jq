# How good is it? What queries found and how long they took.
#   jq -nR -f how-good.jq query-worker.log
[inputs | fromjson? | objects | select(.event == "search" or .event == "search.slow" or .event == "request.rejected" or .event == "http.error" or .event == "balance.drift" or .event == "balance.fit")]
| map(select(.event == "search")) as $searches
| {
    searches: ($searches | length),
    slow: (map(select(.event == "search.slow")) | length),
    turned_away: (map(select(.event == "request.rejected")) | length),
    failed: (map(select(.event == "http.error")) | length),
    moved_share: (if ($searches | map(.results) | add // 0) == 0 then null
                  else ($searches | map(.reranked) | add) / ($searches | map(.results) | add) end),
    median_ms: ($searches | map(.embed_ms + .wait_ms + .scan_ms + .rank_ms) | sort | if length == 0 then null else .[length / 2 | floor] end),
    empty: ($searches | map(select(.matched == 0)) | length),
    balance: (map(select(.event == "balance.drift")) | last | if . == null then null
              else {calibrated, queries, top_hit_changed, no_match, hubness_ratio, drift} end),
    fit: (map(select(.event == "balance.fit" and .role == "live")) | last | if . == null then null
          else {queries, fit, fit_low, fit_high, concentration, weight, proposed_weight} end),
    weights: ($searches | map({normaliser, weight}) | unique)
  }
