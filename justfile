# `just` lists the recipes. `tests/run` (CI runs it) installs what they need, and calls them.

export CARGO_TARGET_DIR := env("CARGO_TARGET_DIR", home_directory() / ".cache/bsap/target")

# As the tests build it: a plain `cargo build` would resolve the features of dependencies without the
# development dependencies, and compile everything a second time.
program := env("CARGO_TARGET_DIR", home_directory() / ".cache/bsap/target") / "debug/bsap"

# List the recipes
default:
    @just --list

# Check formatting; `just fmt fix` formats
fmt mode="check":
    cargo fmt --all {{ if mode == "fix" { "" } else { "-- --check" } }}
    cargo fmt --manifest-path tests/fuzz/Cargo.toml {{ if mode == "fix" { "" } else { "-- --check" } }}

# Clippy with warnings as errors
clippy:
    cargo clippy --all-targets --locked -- -D warnings
    cargo clippy --test kafka --test stores --locked -- -D warnings

# Licences, sources and duplicates of dependencies
deny:
    cargo deny --log-level error check bans licenses sources

# All lints, and known vulnerabilities where the database can be reached
lint:
    tests/run lint

# Unit, integration and browser tests; ends with what passed, failed and was skipped
test:
    tests/run unit stores readers evaluate kafka browser api

# The page in a browser, behind nginx under a path; `just browser long` also behind Apache, Caddy and HAProxy
browser form="":
    {{ if form == "long" { "BSAP_BROWSER_LONG=1" } else { "" } }} tests/run browser

# Ingestion against a real Apache Kafka; `just kafka long` sends 20,000 messages a scenario
kafka form="":
    {{ if form == "long" { "BSAP_KAFKA_LONG=1" } else { "" } }} tests/run kafka

# Faults drawn at random against a real Apache Kafka; the same seed strikes the same
chaos rounds="200" seed="1":
    BSAP_CHAOS_ROUNDS={{ rounds }} BSAP_CHAOS_SEED={{ seed }} tests/run chaos

# Steady load at 80 % of what the machine can do, with queries, and what grows under it
soak minutes="30":
    BSAP_SOAK_MINUTES={{ minutes }} tests/run soak

# Files through the broker in this process to a consumer that is ten times slower than the publisher
backlog files="100000":
    BSAP_BACKLOG_FILES={{ files }} cargo test --release --locked --test pipeline -- --ignored --nocapture a_hundred_thousand_files

# Decode every flavour of every format, AVIF too (minutes of building), and so many files with changed bytes
decoding files="20000" seed="1":
    BSAP_DECODING_FILES={{ files }} BSAP_DECODING_SEED={{ seed }} cargo test --locked --features avif --test decoding -- --nocapture

# Fuzz one target of tests/fuzz, or `all` in turn, for so many seconds each
fuzz target="all" seconds="600":
    tests/fuzz/run {{ target }} {{ seconds }}

# Helm chart, configurations, alert rules and dashboards
deploy:
    tests/run deploy

# Break one thing at a time in a running system: do events, metrics and alerts tell? `just ops long` takes the rules as they are
ops form="":
    {{ if form == "long" { "BSAP_OPS_LONG=1" } else { "" } }} tests/run ops

# Random histories of the table against a plain map, many more than the test command tries
histories runs="3000":
    BSAP_MODEL_RUNS={{ runs }} cargo test --release --locked --lib table::tests::random_histories -- --nocapture

# Benchmarks: each runs both sides in one call and prints their ratio
bench *args:
    cargo bench --locked {{ args }}

# Crates, CPU seconds and binary size of a cold release build; `--check` only counts crates
build-cost *args:
    python3 benches/build_cost.py {{ args }}

# Compare with Hugging Face transformers and PIL on full-size checkpoints; downloads gigabytes
parity *models:
    tests/parity/run parity {{ models }}

# Compute again what `tests/checkpoints` expects, with transformers and open_clip; downloads gigabytes
matrix *rows:
    tests/parity/run matrix {{ rows }}

# Time the encoders beside PyTorch and ONNX Runtime in one run; downloads gigabytes
speed *args:
    tests/parity/run speed {{ args }}

# What balancing gains on embeddings by real CLIP models, by default those of ../shared/real-clip
real-clip *args:
    benches/real_clip/run {{ args }}

# Compare with others in one run: `just peers ingest` (downloads gigabytes), `just peers search [rows]`
peers what *args:
    benches/peers/run {{ what }} {{ args }}

# Build with CUDA and measure exactness and speed on a GPU beside PyTorch; downloads gigabytes
gpu *args:
    tests/parity/run gpu {{ args }}

# Everything that CI checks, set-up included
ci:
    tests/run

# Write again what is generated from the code: configuration reference, example, schemas, log events, metrics
generate:
    cargo test --quiet --locked --no-run --test cli
    {{ program }} config reference > docs/configuration.md
    {{ program }} config schema > schemas/config.schema.json
    {{ program }} config event-schema > schemas/image-event.schema.json
    {{ program }} config cloud-event-schema > schemas/cloud-event.schema.json
    {{ program }} config openapi > schemas/openapi.json
    {{ program }} config bucket-notification-schema > schemas/bucket-notification.schema.json
    {{ program }} config control-request-schema > schemas/control-request.schema.json
    {{ program }} config example > deploy/bsap.example.toml
    {{ program }} config log-events > ops/log-events.md
    {{ program }} config metrics > ops/metrics.md

# Show everything at work in one process
demo *args:
    cargo run --release --locked -- demo {{ args }}
