//! `bsap try` from the start of its parts to the result.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use tokio_util::sync::CancellationToken;

use super::arguments::TryArgs;
use super::configuration::is_demo_model;
use super::evaluation::{evaluate_and_print, resolve_names};
use super::follow::{FollowEnd, FollowPlan, Follower, SharedTracker};
use super::model::load_model;
use super::outcome::TryOutcome;
use super::state_folder::StateFolder;
use super::text_cache::TextCachingEncoders;
use crate::clip::Encoders;
use crate::commands::shared::error::{CommandError, CommandResult, write_json};
use crate::commands::shared::in_process::system::{LocalSystem, SystemPlan};
use crate::commands::shared::models::configured_generation;
use crate::commands::shared::printing::Output;
use crate::config::Config;
use crate::evaluate::JudgedQuery;
use crate::ingest::decode::describe_readable_formats;
use crate::publish::Publisher;
use crate::serve::http::{self, ServerStartError};
use crate::watch::{StoredImageVersion, Tracker, WatchedSource};

/// How long a bucket may take to answer at the start. Later failures are retried.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(20);

/// How often it is checked whether the table has been read.
const READY_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What was checked before anything was started.
pub struct PreparedTry {
    /// The sources.
    pub sources: Vec<WatchedSource>,
    /// The folder, locked.
    pub folder: StateFolder,
    /// The queries with the name of their file.
    pub queries: Option<(PathBuf, Vec<JudgedQuery>)>,
}

/// Runs until everything is stored, or until `token` is cancelled.
pub async fn run_try(
    args: &TryArgs,
    prepared: PreparedTry,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let folder = prepared.folder.path.clone();
    let result = run_parts(args, prepared, config, token).await;
    let nothing_is_lost = ". Nothing is lost: the same command goes on where it was";
    result.map_err(|error| error.explain_full_disk(&folder, nothing_is_lost))
}

async fn run_parts(
    args: &TryArgs,
    prepared: PreparedTry,
    mut config: Config,
    token: CancellationToken,
) -> CommandResult {
    let started = Instant::now();
    let output = Output::new(args.prints_json());
    let PreparedTry { sources, folder, mut queries } = prepared;
    let listener = http::bind_listener(&config.http).await.map_err(|error| match error {
        ServerStartError::Listen { address, source } => CommandError::usage(format!(
            "--port: {address}: {source}; choose another port (--port 0 takes any free one), or stop what uses it"
        )),
        error @ ServerStartError::Tls { .. } => CommandError::usage(error),
    })?;
    let page = listener.url()?;
    folder.describe_owner(&page)?;
    for source in &sources {
        output.line(format_args!("Pictures: {}", source.kind.address()));
        source.check_reachable(SOURCE_TIMEOUT).await?;
    }
    let is_demo = is_demo_model(args);
    let Some(encoders) = load_model(&config, is_demo, output, &token).await? else {
        return Err(anyhow!("stopped before the model was loaded").into());
    };
    let encoders = Arc::new(TextCachingEncoders::new(encoders));
    if !encoders.embed_prompts(&config.prompts, output, &token).await? {
        return Err(anyhow!("stopped before the prompts were embedded").into());
    }
    let encoders: Arc<dyn Encoders> = encoders;
    // Each model has a table of its own, so that another model can be tried in the same folder.
    let generation = configured_generation(&config, &*encoders);
    let table = folder.path.join("catalogue").join(&generation.id).display().to_string();
    config.table.url.clone_from(&table);
    let tracker = SharedTracker::new();
    let progress = tracker.notified_progress();
    let plan = SystemPlan {
        partitions: 1,
        workers: 1,
        maintains_table: true,
        substitutes: Vec::new(),
        judge: None,
    };
    let mut system =
        LocalSystem::start(plan, &mut config, encoders.clone(), progress, listener, &token).await?;
    output.line(format_args!(
        "The page is at {page}, the table and the log are in {}",
        folder.path.display()
    ));
    let plan = FollowPlan {
        sources,
        roots: config.fetch.file_roots.clone(),
        excluded: vec![folder.path.clone()],
        attribute_types: config.attributes.clone(),
        once: args.once,
    };
    let followed = async {
        while !system.engine.snapshots().is_ready() {
            tokio::select! {
                biased;
                () = token.cancelled() => return Ok(FollowEnd::Stopped),
                ended = system.wait_for_end() => {
                    ended?;
                    return Ok(FollowEnd::Stopped);
                }
                () = tokio::time::sleep(READY_POLL_INTERVAL) => {}
            }
        }
        let snapshot = system.engine.snapshots().newest();
        let stored = snapshot.images().map(|image| {
            let version = StoredImageVersion {
                sequence: image.version.sequence,
                event_time: image.event_time,
                size_bytes: image.byte_size,
                uri: image.uri,
                attributes: image.attributes,
            };
            (image.image_id.as_str().to_owned(), version)
        });
        *tracker.lock() = Tracker::new(plan.attribute_types.clone(), stored);
        // The tracker limits what is on its way, so that sending never has to wait for the broker.
        let publisher = Publisher::new(&config.kafka, &config.source.topic)?;
        let mut follower =
            Follower::new(plan, tracker.clone(), publisher, &mut system, output, started)?;
        let mut end = follower.run(&token).await?;
        if end == FollowEnd::Complete
            && let Some((file, mut judged)) = queries.take()
        {
            let unknown = resolve_names(&mut judged, &tracker.lock());
            let queries = (file, judged);
            evaluate_and_print(
                queries,
                &unknown,
                &config,
                encoders.clone(),
                &folder.path,
                output,
                &token,
            )
            .await?;
        }
        if end == FollowEnd::Complete && !args.once {
            output.line(format_args!("Following changes. Ctrl-C ends."));
            end = follower.run(&token).await?;
        }
        Ok::<_, CommandError>(end)
    };
    let followed = followed.await;
    let drained = system.shut_down().await;
    let end = followed?;
    drained?;
    let seconds = started.elapsed().as_secs_f64();
    let outcome = TryOutcome::new(&tracker.lock(), seconds, encoders.card().name.clone(), table);
    write_json(&outcome, args.json.as_ref())?;
    match end {
        FollowEnd::NoPictures => Err(CommandError::usage(format!(
            "there is no picture ({}) in {}; name a folder that has some",
            describe_readable_formats(),
            args.paths.join(", ")
        ))),
        FollowEnd::Stopped if args.once => Err(anyhow!(
            "stopped after {} of {} files; the same command goes on where it was",
            outcome.found - outcome.pending,
            outcome.found
        )
        .into()),
        FollowEnd::Complete if outcome.failed > 0 => {
            Err(anyhow!("{} files could not be stored; the lines above say why", outcome.failed)
                .into())
        }
        FollowEnd::Stopped if outcome.pending > 0 => {
            output.line(format_args!(
                "Stopped with {} files waiting; the same command goes on where it was",
                outcome.pending
            ));
            Ok(())
        }
        FollowEnd::Complete | FollowEnd::Stopped => Ok(()),
    }
}
