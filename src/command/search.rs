//! `bsap search`.

use std::time::Duration;

use anyhow::{Context, bail};
use reqwest::header::CONTENT_TYPE;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{Done, Failure, parts, table_view};
use crate::cli::SearchArgs;
use crate::config::Config;
use crate::http::SearchAnswer;
use crate::search::{Query, QueryError};

/// How long a server may take to answer.
const SERVER_TIMEOUT: Duration = Duration::from_secs(30);

/// Asks a running server.
pub async fn ask_server(args: &SearchArgs) -> Done {
    let server = args.server.as_deref().unwrap_or_default();
    let base = url::Url::parse(server).ok().filter(|url| url.has_host()).ok_or_else(|| {
        Failure::usage(format!("--server: {server:?} is not a URL such as http://127.0.0.1:8080"))
    })?;
    let answer = ask(args, base).await?;
    show(args, &answer)
}

async fn ask(args: &SearchArgs, base: url::Url) -> anyhow::Result<SearchAnswer> {
    let mut body = json!({"text": args.text, "k": args.k});
    if let Some(normaliser) = args.normaliser {
        body["normaliser"] = normaliser.name().into();
    }
    if let Some(weight) = args.weight {
        body["weight"] = weight.into();
    }
    if let Some(set) = &args.prompt_set {
        body["prompt_set"] = set.as_str().into();
    }
    let client = reqwest::Client::builder().timeout(SERVER_TIMEOUT).build()?;
    let url = base.join("/v1/search")?;
    let request = client.post(url).header(CONTENT_TYPE, "application/json").body(body.to_string());
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
pub async fn ask_table(args: &SearchArgs, config: Config, token: CancellationToken) -> Done {
    let towers = parts::towers(&config)?;
    let Some((engine, generation)) = parts::whole_table(&config, towers, &token).await? else {
        return Ok(());
    };
    let query = Query {
        input: args.text.as_str().into(),
        k: Some(args.k),
        prompt_set: args.prompt_set.clone(),
        normaliser: args.normaliser,
        weight: args.weight,
        ..Query::default()
    };
    let results = tokio::task::spawn_blocking(move || engine.search(&query)).await?;
    match results {
        Ok(results) => show(args, &SearchAnswer::new(&results, &generation)),
        Err(error @ QueryError::Invalid { .. }) => Err(Failure::usage(error)),
        Err(error) => Err(error.into()),
    }
}

fn show(args: &SearchArgs, answer: &SearchAnswer) -> Done {
    if args.json {
        say!("{}", serde_json::to_string_pretty(answer)?);
    } else {
        say!("{}", table_view::side_by_side(answer));
    }
    Ok(())
}
