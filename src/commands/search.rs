//! `bsap search`.

use std::time::Duration;

use anyhow::{Context, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::cli::SearchArgs;
use super::{CommandError, CommandResult, result_table, setup};
use crate::config::Config;
use crate::search::{Query, QueryError};
use crate::serve::http::{SearchRequest, SearchResponse};

/// How long a server may take to answer.
const SERVER_TIMEOUT: Duration = Duration::from_secs(30);

/// Asks a running server.
pub async fn search_server(args: &SearchArgs) -> CommandResult {
    let server = args.server.as_deref().unwrap_or_default();
    let base = url::Url::parse(server).ok().filter(|url| url.has_host()).ok_or_else(|| {
        CommandError::usage(format!(
            "--server: {server:?} is not a URL such as http://127.0.0.1:8080"
        ))
    })?;
    let answer = post_search(request_body(args)?, base, args.key.as_deref()).await?;
    print_answer(args, &answer)
}

/// What the arguments ask for, as the server hears it.
fn request_body(args: &SearchArgs) -> Result<Value, CommandError> {
    let image = args.image.as_ref().map(|file| {
        let bytes = std::fs::read(file);
        let bytes =
            bytes.map_err(|e| CommandError::usage(format!("--image: {}: {e}", file.display())));
        bytes.map(|bytes| STANDARD.encode(bytes))
    });
    let filter = args.filter.as_ref().map(|text| {
        serde_json::from_str(text).map_err(|e| CommandError::usage(format!("--filter: {e}")))
    });
    let min_score = args.min_score.as_ref().map(|text| match text.parse::<f32>() {
        Ok(score) => json!(score),
        Err(_) => json!(text),
    });
    let mut body = json!({
        "text": args.text,
        "image": image.transpose()?,
        "image_id": args.similar_to,
        "k": args.k,
        "filter": filter.transpose()?.unwrap_or(Value::Null),
        "min_score": min_score,
        "normaliser": args.normaliser,
        "weight": args.weight,
        "prompt_set": args.prompt_set,
    });
    if let Some(fields) = body.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    Ok(body)
}

async fn post_search(
    body: Value,
    base: url::Url,
    key: Option<&str>,
) -> anyhow::Result<SearchResponse> {
    let client = reqwest::Client::builder().timeout(SERVER_TIMEOUT).build()?;
    let url = base.join("/v1/search")?;
    let mut request =
        client.post(url).header(CONTENT_TYPE, "application/json").body(body.to_string());
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    let response = request
        .send()
        .await
        .with_context(|| format!("{base}: no answer; is a server running (`bsap serve`)?"))?;
    let status = response.status();
    let bytes = response.bytes().await.with_context(|| format!("{base}: the answer broke off"))?;
    if !status.is_success() {
        let problem: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
        bail!("{base}: {status}: {}", problem["detail"].as_str().unwrap_or("no reason given"));
    }
    serde_json::from_slice(&bytes).with_context(|| format!("{base}: this is no answer of bsap"))
}

/// Asks the table itself.
pub async fn search_table(
    args: &SearchArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let request = serde_json::from_value::<SearchRequest>(request_body(args)?);
    let query =
        Query::try_from(request.map_err(CommandError::usage)?).map_err(CommandError::usage)?;
    let encoders = setup::load_encoders(&config)?;
    let Some(engine) = setup::load_table_engine(&config, encoders, &token).await? else {
        return Ok(());
    };
    let results = tokio::task::spawn_blocking(move || engine.search(&query)).await?;
    match results {
        Ok(results) => print_answer(args, &SearchResponse::new(&results)),
        Err(error @ (QueryError::InvalidField { .. } | QueryError::ImageNotFound(_))) => {
            Err(CommandError::usage(error))
        }
        Err(error) => Err(error.into()),
    }
}

fn print_answer(args: &SearchArgs, answer: &SearchResponse) -> CommandResult {
    if args.json {
        say!("{}", serde_json::to_string_pretty(answer)?);
    } else {
        say!("{}", result_table::render_side_by_side(answer));
    }
    Ok(())
}
