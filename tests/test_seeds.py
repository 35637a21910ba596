"""The five systems on one server: which test covers which feature, and one job watched in all dialects."""

from __future__ import annotations

import ast
import base64
import json
from collections import Counter
from pathlib import Path

import httpx
import httpx_sse
import pytest
import trio
from harness import STREAMS, StreamMessage
from programs import require_program

import sseserve
from sseserve.sse import Decoder

# Every feature that a seed names for the server, and the tests that cover it.
TABLE: dict[str, dict[str, list[str]]] = {
    "000 interaction": {
        "typed events with id and retry": ["interaction::test_an_event_has_id_retry_type_and_data"],
        "retry of every type, in every dialect": [
            "interaction::test_every_type_may_set_the_retry_time",
            "interaction::test_invalid_retry_times_are_refused",
        ],
        "data as it was published": [
            "interaction::test_data_arrives_as_it_was_published",
            "interaction::test_indented_json_arrives_on_one_line",
        ],
        "publish by HTTP": ["interaction::test_the_seeds_example"],
        "publish in process": [
            "interaction::test_publish_in_process",
            "interaction::test_publish_from_the_servers_program",
        ],
        "several readers of one session": ["interaction::test_every_reader_gets_every_event"],
        "one reader's disconnect ends no other stream": ["interaction::test_disconnect_ends_no_other_stream"],
        "publish without listeners is kept": ["interaction::test_events_without_listeners_are_kept"],
        "and is a warning in the log": [
            "interaction::test_events_without_listeners_are_kept",
            "interaction::test_with_a_listener_nothing_is_logged",
            "interaction::test_other_dialects_do_not_warn_of_no_listeners",
        ],
        "processing, transcription and error events": ["interaction::test_the_seeds_example"],
        "fraction progress": [
            "interaction::test_fractions_are_percentages_in_other_dialects",
            "interaction::test_invalid_fractions_are_refused",
        ],
        "another stage may begin at 0": ["interaction::test_another_stage_may_begin_at_0_again"],
        "a fraction that falls is held": ["interaction::test_a_fraction_that_falls_is_held"],
        "a client that disconnects is logged": ["sessions::test_every_client_that_leaves_is_logged"],
        "recoverable errors": ["interaction::test_recoverable_error_does_not_end_the_session"],
        "unrecoverable errors": ["interaction::test_unrecoverable_error_ends_the_session"],
        "stream before the session exists": ["interaction::test_stream_opened_before_its_session"],
        "event ids for resuming": ["interaction::test_resuming_after_a_cursor"],
        "headers of the stream": ["interaction::test_stream_headers"],
        "back-pressure: what waits for a slow reader is bounded": [
            "broker::test_buffer_is_bounded",
            "connection::test_stalled_reader_is_cut_with_a_reason",
        ],
        "events that come fast are sent together": [
            "broker::test_batch_is_encoded_once",
            "broker::test_writes_are_joined_up_to_a_limit",
        ],
        "unused channels are removed": ["broker::test_unwatched_topics_are_removed"],
        "Dispose ends all streams": ["drain::test_streams_are_asked_to_reconnect"],
        "keep-alive of an idle connection": ["interaction::test_a_waiting_stream_gets_heartbeats"],
        "type safety: what cannot be a type": ["interaction::test_types_cannot_break_the_framing"],
        "Redis for several servers, with event sharing": [
            "redis_engine::test_other_instances_get_what_is_appended",
            "instances::test_an_instance_is_killed",
        ],
        "persistence of events": [
            "sqlite::test_everything_is_there_after_a_restart",
            "sqlite_kill::test_kill",
            "redis_engine::test_restart_with_append_only_file_loses_nothing",
        ],
        "event replay": ["interaction::test_resuming_after_a_cursor", "engines::test_pages"],
        "connections to Redis are reused": ["redis_connection::test_commands"],
        "its own browser client": ["examples::test_interaction"],
    },
    "001 jobs": {
        "create": ["jobs::test_create_get_and_list"],
        "quick demo": [
            "jobs::test_quick_demo_renders_a_film",
            "jobs::test_quick_demo_needs_no_body",
            "jobs::test_quick_demo_has_the_same_request_on_create_and_get",
        ],
        "get": ["jobs::test_create_get_and_list", "jobs::test_statuses_of_the_job_store"],
        "cancel": ["jobs::test_cancel_reaches_the_worker"],
        "all eight event types": [
            "jobs::test_all_eight_event_types",
            "jobs::test_update_sends_what_it_changes",
        ],
        "warning": ["jobs::test_warning_and_non_fatal_error"],
        "error and job-failed": [
            "jobs::test_failure_sends_error_and_job_failed",
            "jobs::test_lost_job_is_sent_as_failed",
        ],
        "an error event always has a message": ["jobs::test_error_event_always_has_a_message_and_a_code"],
        "validation, provider and generic errors": ["jobs::test_failures_of_a_runner_are_told_apart"],
        "the job store's status Skipped": ["jobs::test_skipped_is_an_end"],
        "stage -> phase": ["jobs::test_stage_to_phase"],
        "percent ranges": ["jobs::test_phases_cover_the_whole_job"],
        "job's percent from the phase's percent": [
            "jobs::test_percent_of_the_job_and_of_the_phase",
            "jobs::test_stage_without_a_percentage_begins_its_phase",
        ],
        "an earlier phase, or less of one, does not lower the job's percent": [
            "jobs::test_stage_without_a_percentage_begins_its_phase"
        ],
        "members of a progress event": ["jobs::test_members_of_a_progress_event"],
        "artifacts and output in the final event": [
            "jobs::test_the_final_event_has_artifacts_and_output",
            "jobs::test_output_is_found_by_name_and_size_in_either_spelling",
            "jobs::test_no_output_without_a_video",
        ],
        "keep-alive comment with the time every 10 s": ["jobs::test_keep_alive_comments_carry_the_time"],
        "correlation ids": [
            "jobs::test_correlation_ids",
            "jobs::test_correlation_ids_on_every_path",
            "jobs::test_failures_of_a_runner_are_told_apart",
        ],
        "WebSocket, also as its client's fallback": [
            "jobs::test_a_job_over_websocket",
            "examples::test_websocket_fallback_of_the_jobs_page",
        ],
        "reconnecting after 1, 2, 4, 8 and 16 s, 5 times": [
            "examples::test_websocket_fallback_of_the_jobs_page"
        ],
        "metrics: open streams, reconnections, latency of events": ["jobs::test_metrics_of_the_streams"],
        "metrics: failed jobs": ["sessions::test_durations_and_error_rate"],
        "the same authentication as the REST paths": ["auth::test_every_route_requires_a_token"],
        "job ids and event data are validated": [
            "tracker::test_invalid_session_id",
            "rules::test_texts_have_a_limit",
        ],
        "HTTP/2": ["clients::test_httpx_sse_gets_exactly_the_log"],
        "behind proxies that end idle connections": ["proxies::test_heartbeats_come_before_a_proxy_gives_up"],
        "the panel: error text, Retry, View Logs; picked up after a reload, closed on leaving": [
            "examples::test_recovery_in_the_jobs_page"
        ],
        "several jobs at once": ["jobs::test_several_jobs_at_once"],
        "history with replay": ["jobs::test_history_with_replay"],
        "resume, also within an event": [
            "jobs::test_a_cursor_resumes_between_any_two_messages",
            "jobs::test_resuming_after_every_message",
            "jobs::test_live_and_replayed_messages_are_the_same",
        ],
        "pause and resume": ["jobs::test_pause_and_resume", "jobs::test_demo_pauses_and_resumes"],
        "ETA": ["jobs::test_eta"],
        "a queue that runs at most N at a time, in order": [
            "queue::test_running_jobs_are_limited_and_start_in_order",
            "queue::test_jobs_submitted_together_keep_their_order",
            "queue::test_full_queue_is_unavailable",
        ],
        "cancelled while it waits it never runs": ["queue::test_job_cancelled_while_queued_never_runs"],
        "distributed execution: workers elsewhere claim queued jobs": [
            "claims::test_claims_get_the_jobs_in_their_order",
            "claims::test_a_waiting_claim_gets_the_next_job",
            "claims::test_no_job_is_handed_out_twice",
            "claims::test_ended_jobs_are_never_handed_out",
            "claims::test_a_job_that_somebody_has_begun_is_not_handed_out",
            "claims::test_a_worker_publishes_by_the_ordinary_paths",
            "claims::test_claims_beside_the_servers_runner",
        ],
        "a worker elsewhere that dies": ["claims::test_a_job_of_a_worker_that_dies_is_lost"],
        "a runner of the program's own": [
            "queue::test_serve_accepts_a_runner",
            "queue::test_runner_gets_the_request_body",
        ],
        "a runner that raises": ["queue::test_runner_that_raises_fails_the_job"],
        "Demo Mode always works": [
            "jobs::test_quick_demo_does_not_use_the_runner",
            "jobs::test_without_a_runner_jobs_are_demo_jobs",
            "claims::test_the_server_runs_demonstrations_itself",
        ],
        "its artifact downloads": ["jobs::test_quick_demo_renders_a_film"],
        "artifacts made by the reported phases": ["jobs::test_artifacts_are_made_by_the_phases"],
        "its own workers": ["examples::test_jobs_in_workers_of_their_own"],
        "its own clients": ["examples::test_jobs_in_a_page", "examples::test_jobs_in_the_terminal"],
    },
    "002 jobs v1": {
        "create returns {jobId, sseEndpoint}": ["podcast::test_create_returns_the_endpoint"],
        "a stream may be opened before its job is known": [
            "podcast::test_stream_opened_before_its_job_is_known"
        ],
        "unnamed messages of its interface": [
            "podcast::test_a_message_has_the_members_of_the_interface",
            "podcast::test_members_that_were_not_published",
            "podcast::test_other_events_keep_their_names",
        ],
        "messages as they were published": ["podcast::test_messages_are_as_published"],
        "data of this update alone": [
            "podcast::test_messages_are_as_published",
            "podcast::test_data_published_in_another_dialect",
        ],
        "a percent that falls is held": ["podcast::test_a_percent_that_falls_is_held"],
        "stages": ["podcast::test_every_message_has_a_stage"],
        "four statuses": ["podcast::test_status_is_one_of_four"],
        "updates until completion": ["podcast::test_updates_come_until_the_job_is_complete"],
        "heartbeat every 30 s": ["podcast::test_heartbeats_every_30_seconds"],
        "1 h connection limit as a planned end with retry and resume": [
            "podcast::test_a_connection_ends_after_an_hour"
        ],
        "health": ["podcast::test_health_counts_the_connections_of_each_job"],
        "a user watches its own jobs only": ["podcast::test_job_ownership"],
        "CORS": ["server::test_cors_headers", "clients::test_cross_origin_page"],
        "several connections of one job": ["podcast::test_health_counts_the_connections_of_each_job"],
        "metrics of Pub/Sub: latency": ["podcast::test_latency_of_pubsub_is_measured"],
        "connections per job": ["podcast::test_health_counts_the_connections_of_each_job"],
        "environment variables as aliases": [
            "podcast::test_environment_variables_of_the_seed",
            "podcast::test_own_variables_override_the_aliases",
            "podcast::test_invalid_alias_values",
        ],
        "variables without effect are warned about: Pub/Sub, NODE_ENV": [
            "podcast::test_variables_of_a_pull_subscription_are_warned_about",
            "podcast::test_environments_of_node",
            "podcast::test_the_server_warns_at_its_start",
        ],
        "the aliases have their effect": ["podcast::test_maximum_age_is_a_setting"],
        "Pub/Sub push: the standard envelope": ["podcast::test_a_push_is_an_update"],
        "Pub/Sub push: its OIDC token": ["push_tokens::test_tokens_of_google"],
        "Pub/Sub push: delivered twice": [
            "podcast::test_a_second_delivery_changes_nothing",
            "podcast::test_concurrent_deliveries_of_one_message",
        ],
        "Pub/Sub push: an invalid message is acknowledged and counted": [
            "podcast::test_invalid_message_is_acknowledged_and_counted",
            "podcast::test_a_message_that_is_too_large_is_acknowledged_too",
        ],
        "Pub/Sub push: a temporary failure is not": ["podcast::test_temporary_failure_is_not_acknowledged"],
        "Pub/Sub pull": [
            "pubsub_subscriber::test_pulled_updates_reach_the_clients",
            "pubsub_subscriber::test_updates_that_the_server_cannot_take_are_delivered_again",
            "pubsub_subscriber::test_token_of_the_service_account",
        ],
        "REDIS_HOST, REDIS_PORT and REDIS_PASSWORD": [
            "podcast::test_environment_variables_of_the_seed",
            "channels::test_which_redis",
            "redis_connection::test_unix_socket_and_password",
        ],
        "several instances: a client may reconnect to any": [
            "redis_engine::test_other_instances_get_what_is_appended",
            "instances::test_an_instance_is_killed",
        ],
        "connections per job on all instances": ["instances::test_watchers_of_all_instances"],
        "Redis: the set job:{id}:instances, and instance:{instance}:{id} for an hour": [
            "channels::test_instances_that_watch_a_job",
            "channels::test_a_server_that_stops_leaves_the_sets",
        ],
        "Redis: job:{id}:updates is read, by its pattern": [
            "channels::test_messages_are_watched_in_every_dialect",
            "channels::test_extra_members_reach_the_clients_of_the_system",
        ],
        "Redis: job:{id}:updates is written, whatever a status came by": [
            "channels::test_progress_is_written_as_each_system_knows_it",
            "channels::test_what_is_written_is_not_read",
            "channels::test_what_came_from_a_channel_is_not_written_back",
        ],
        "Redis: each instance reads all, and a message is one event": [
            "channels::test_several_servers_record_each_message_once",
            "channels::test_one_of_several_instances_records_a_message",
            "channels::test_a_server_that_has_just_subscribed_does_not_overtake",
        ],
        "Redis: each status is written once, in order": [
            "channels::test_several_servers_write_each_event_once",
            "channels::test_an_event_waits_for_those_before_it",
            "channels::test_an_event_that_was_overtaken_is_not_written",
        ],
        "Redis prevents the loss of messages": [
            "channels::test_messages_wait_while_the_engine_cannot_store",
            "channels::test_messages_wait_while_the_redis_of_the_engine_is_away",
            "channels::test_waiting_messages_are_bounded",
        ],
        "Redis fails over": ["redis_engine::test_append_in_doubt", "redis_away::test_everything_catches_up"],
        "its own clients": [
            "seed_clients::test_podcast_client_in_a_browser",
            "seed_clients::test_podcast_client_with_curl",
            "examples::test_podcast",
        ],
    },
    "003 sessions": {
        "edge case 1: before the pipeline starts": ["sessions::test_connecting_before_the_pipeline_starts"],
        "edge case 2: after the end": ["sessions::test_connecting_after_the_end"],
        "edge case 3: a disconnect, which is logged": [
            "sessions::test_disconnecting_mid_stream",
            "sessions::test_every_client_that_leaves_is_logged",
            "sessions::test_planned_ends_are_not_departures",
        ],
        "edge case 4: not found": ["sessions::test_an_unknown_session_is_not_found"],
        "where a token comes from: JWT, tickets": [
            "sessions::test_access_is_denied_whether_the_session_exists_or_not",
            "tickets::test_a_ticket_opens_one_stream",
        ],
        "edge case 5: no permission": ["sessions::test_access_is_denied_whether_the_session_exists_or_not"],
        "Bearer tokens: 401": [
            "sessions::test_access_is_denied_whether_the_session_exists_or_not",
            "auth::test_every_route_requires_a_token",
        ],
        "patients, therapists and admins": ["auth::test_roles", "auth::test_access_to_sessions_by_role"],
        "progress event": ["sessions::test_a_progress_event"],
        "complete event": ["sessions::test_a_complete_event"],
        "error event": [
            "sessions::test_an_error_event",
            "sessions::test_an_error_event_always_has_an_error",
            "sessions::test_error_of_a_failure_in_another_dialect",
            "sessions::test_non_final_error_is_a_warning",
        ],
        "the protocol's bytes": ["sessions::test_byte_format"],
        "heartbeat every 15 s": ["sessions::test_heartbeats_every_15_seconds"],
        "headers": ["sessions::test_headers"],
        "CORS": ["sessions::test_cors"],
        "SSE and WebSocket on one tracker": [
            "sessions::test_websocket_and_sse_deliver_the_same",
            "sessions::test_a_client_may_change_transport",
        ],
        "polling every 2 s": [
            "sessions::test_polling_every_two_seconds",
            "sessions::test_polling_with_an_etag",
        ],
        "behind nginx": ["proxies::test_events_are_not_delayed", "proxies::test_resuming"],
        "fall back to polling if SSE is not supported": ["examples::test_sessions_without_streams"],
        "auto-reconnection": ["examples::test_sessions_client_survives_a_broken_stream"],
        "metrics: connections, their average duration, error rates": [
            "server::test_health_and_metrics",
            "sessions::test_durations_and_error_rate",
        ],
        "Redis: RedisProgressTracker runs unchanged": ["channels::test_the_seeds_progress_tracker"],
        "Redis: progress in session:{id}:progress for an hour": [
            "channels::test_keys_at_the_start",
            "channels::test_key_of_a_session_that_is_asked_for",
            "channels::test_keys_after_the_connection_was_lost",
            "channels::test_key_of_a_session_that_was_deleted",
            "channels::test_progress_is_written_as_each_system_knows_it",
        ],
        "Redis: session:{id}:updates in real time": [
            "channels::test_messages_are_watched_in_every_dialect",
            "channels::test_a_message_after_the_end_is_logged",
        ],
        "Redis: several instances, for SSE and WebSocket": [
            "redis_engine::test_other_instances_get_what_is_appended",
            "instances::test_watchers_of_all_instances",
            "channels::test_several_servers_record_each_message_once",
        ],
        "its own clients": ["sessions::test_the_seeds_python_client", "examples::test_sessions"],
    },
    "004 transcription": {
        "current status first": [
            "transcription::test_the_current_status_comes_first",
            "transcription::test_current_status_has_the_extra_members",
        ],
        "stop on completed and failed": [
            "transcription::test_the_stream_stops_on_completed_and_failed",
            "transcription::test_every_end_is_completed_or_failed",
        ],
        "its message": [
            "transcription::test_a_message_has_the_five_members",
            "transcription::test_other_events_keep_their_names",
        ],
        "extra members": [
            "transcription::test_extra_members_are_sent",
            "throttle::test_new_data_is_superseded_by_new_data_only",
        ],
        "a status update without status": ["transcription::test_a_status_without_a_status"],
        "a percent that falls is held": ["transcription::test_a_percent_that_falls_is_held"],
        "a user watches its own sessions only": ["auth::test_access_to_sessions_by_role"],
        "a page of another origin, with credentials": ["clients::test_cross_origin_page"],
        "a task that is retried after it failed": [
            "transcription::test_a_retried_task_begins_another_attempt",
            "transcription::test_another_attempt_begins_afresh",
            "transcription::test_what_begins_another_attempt",
            "transcription::test_other_dialects_do_not_try_again",
            "resume::test_watchers_of_a_session_that_is_tried_again",
            "resume::test_polling_a_session_that_is_tried_again",
            "bundle::test_session_that_is_tried_again_is_reset",
            "bundle::test_session_that_is_tried_again_after_its_end_was_seen",
        ],
        "a cancelled connection is logged": ["sessions::test_every_client_that_leaves_is_logged"],
        "StatusPublisher.publish_status_update": [
            "publisher::test_seed_task",
            "publisher::test_invalid_status_is_ignored",
            "publisher::test_lost_response_is_retried_with_the_same_key",
            "publisher::test_unreachable_server",
        ],
        "reading in Python, as StatusSubscriber does": [
            "client::test_watches_to_the_end",
            "channels::test_the_seeds_subscriber",
        ],
        "Redis: transcription:status:{id} is read": [
            "channels::test_messages_are_watched_in_every_dialect",
            "channels::test_a_task_that_is_retried",
            "channels::test_order_is_kept",
            "channels::test_equal_messages",
            "channels::test_bad_messages_change_nothing",
        ],
        "Redis: StatusPublisher with redis-py": [
            "channels::test_the_seeds_celery_task",
            "publisher_redis::test_seed_task",
            "publisher_redis::test_message",
            "publisher_redis::test_each_update_is_recorded_once",
            "publisher_redis::test_redis_is_away",
            "publisher_redis::test_fork_and_threads",
        ],
        "a Celery worker, with Redis as its broker": [
            "examples::test_celery",
            "examples::test_celery_over_http",
        ],
        "connections to Redis are reused": ["redis_connection::test_commands"],
        "polling": ["transcription::test_polling"],
        "ENABLE_SSE": ["transcription::test_sse_can_be_switched_off"],
        "idle end after 5 min": [
            "transcription::test_an_idle_stream_ends_after_five_minutes",
            "transcription::test_an_event_restarts_the_idle_timeout",
            "examples::test_planned_end_of_an_idle_stream_is_no_error",
        ],
        "SSE_CONNECTION_TIMEOUT and REDIS_URL": [
            "transcription::test_idle_timeout_is_a_setting",
            "transcription::test_redis_url_selects_the_engine",
        ],
        "at most N streams per user": [
            "transcription::test_stream_limit_per_user",
            "transcription::test_streams_over_http2_are_counted_too",
            "transcription::test_streams_are_counted_by_address_over_both_protocols",
            "transcription::test_ended_streams_release_their_slots",
        ],
        "throttle: leading edge": ["throttle::test_first_update_is_sent_at_once"],
        "throttle: trailing edge": [
            "throttle::test_last_update_of_a_burst_is_sent",
            "throttle::test_update_throttled_when_another_is_due_is_sent",
        ],
        "throttle: no terminal event is dropped": ["throttle::test_end_is_sent_at_once_and_ends_the_stream"],
        "throttle: no non-progress event is dropped": ["throttle::test_other_events_are_never_throttled"],
        "throttle: nothing is reordered": ["throttle::test_random_bursts"],
        "TTL": ["transcription::test_session_is_deleted_after_its_ttl"],
        "the hook: polls after three attempts": [
            "examples::test_hook_polls_after_three_attempts",
            "examples::test_hook_polls_without_eventsource",
            "examples::test_transcription_without_streaming",
        ],
        "the hook: one stream": ["examples::test_hook_has_one_stream_however_often_it_breaks"],
        "the hook: Visibility API": ["examples::test_hook_pauses_while_the_page_is_hidden"],
        "its own client": ["examples::test_transcription"],
    },
    "leases and job lifetime": {
        "lease on create": [
            "leases::test_watchers_get_stalled_and_lost",
            "leases::test_invalid_lease",
        ],
        "stalled, then lost": ["leases::test_stalled_after_one_lease_lost_after_three"],
        "an update renews it": [
            "leases::test_every_update_renews_the_lease",
            "leases::test_stalled_session_recovers_and_stalls_again",
        ],
        "a late watcher of a lost job": ["leases::test_late_watcher_of_a_lost_job"],
        "control in the response to the next update": [
            "leases::test_control_is_in_the_response_to_an_update"
        ],
        "control events for workers": [
            "leases::test_control_stream",
            "leases::test_control_stream_resumes_after_its_cursor",
        ],
    },
    "several sessions on one stream": {
        "one cursor for all": ["bundle::test_cursor_has_a_position_in_each_session"],
        "resume exact per session": [
            "bundle::test_resume_after_every_message",
            "bundle::test_live_and_resumed_streams_are_equal",
        ],
        "ended ones": [
            "bundle::test_stream_ends_with_its_last_session",
            "bundle::test_missed_ends_are_sent",
        ],
        "deleted ones": [
            "bundle::test_deleted_session_is_reported_and_removed",
            "bundle::test_resume_reports_deleted_sessions",
        ],
        "drain": ["bundle::test_drain_sends_a_retry_time"],
    },
    "together": {
        "one job through all five dialects at once": ["seeds::test_one_job_through_all_five_dialects"],
        "third-party clients": ["sse_clients::test_cut_streams_are_resumed_without_loss"],
        "the README's table of paths": ["readme::test_table_of_routes"],
    },
}

# Features that a seed names and that the server does not have, or not as the seed has them.
NOT_COVERED = {
    "000 interaction": [
        "the header Connection: keep-alive, since a connection over HTTP/1.1 ends with its stream",
        "processing, complete or error events whose data is not an object: they are refused with 422",
    ],
    "001 jobs": ["limits of the rate of connections"],
    "002 jobs v1": [
        "metrics of Redis itself: its memory and its connections",
        "an image for Cloud Run",
        "limits of the rate of connections",
    ],
    "003 sessions": [
        "404 for a session that does not exist, to users who may not see all: it is 403 for them",
        "compression of streams",
    ],
}

MODULES = {
    "interaction": "test_seed_interaction",
    "jobs": "test_seed_jobs",
    "podcast": "test_seed_podcast",
    "sessions": "test_seed_sessions",
    "transcription": "test_seed_transcription",
    "publisher": "test_status_publisher",
    "publisher_redis": "test_status_publisher_redis",
}
CHECKED_MODULES = [
    *("interaction", "jobs", "podcast", "sessions", "transcription", "queue", "publisher"),
    *("throttle", "leases", "bundle", "claims", "channels", "publisher_redis"),
]


def docstrings(module):
    """Return the names of a module's tests and their docstrings."""
    name = MODULES.get(module, f"test_{module}")
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f.name: ast.get_docstring(f) for f in functions if f.name.startswith("test_")}


@pytest.mark.parametrize("seed", TABLE)
def test_every_feature_has_tests(seed):
    """Each feature names at least one test, none of them twice, and each of them exists."""
    for feature, rows in TABLE[seed].items():
        assert rows, feature
        for row in rows:
            module, _, name = row.partition("::")
            tests = docstrings(module)
            assert tests, row
            assert name in tests, f"{feature}: {row}"
        assert len(rows) == len(set(rows))


def test_no_feature_is_in_both_tables():
    """A feature has a test or is not covered; each test of the checked modules has a docstring."""
    for seed, features in NOT_COVERED.items():
        assert not TABLE[seed].keys() & set(features)
    for module in CHECKED_MODULES:
        assert all(docstrings(module).values()), module


def test_no_test_name_is_used_twice():
    """Of two tests with one name in a module only the last one would run."""
    for module in [*CHECKED_MODULES, "seeds"]:
        source = (Path(__file__).parent / f"{MODULES.get(module, f'test_{module}')}.py").read_text()
        counts = Counter(n.name for n in ast.parse(source).body if isinstance(n, ast.AsyncFunctionDef))
        assert [name for name, count in counts.items() if count > 1] == []


# One job, five dialects


def percent_of(dialect, message):
    """Return the percentage in a message, None if it has none."""
    match dialect, message.event:
        case "interaction", "processing":
            return round(message.data["progress"] * 100, 6)
        case "jobs", "step-progress":
            return message.data["percent"]
        case ("jobs_v1" | "transcription", "message") | ("sessions", "progress"):
            return None if message.data["status"] in ("completed", "failed") else message.data["progress"]
    return None


def end_of(dialect, message):
    """Whether a message is the end, and which: True if it succeeded, False if it failed, else None."""
    match dialect:
        case "sessions" | "interaction":
            return {"complete": True, "error": False}.get(message.event)
        case "jobs":
            return {"job-completed": True, "job-failed": False}.get(message.event)
        case _:
            return {"completed": True, "failed": False}.get(message.data.get("status"))


async def read_with_httpx_sse(client, url, messages):
    """Read a stream with httpx-sse."""
    async with httpx_sse.aconnect_sse(client, "GET", url) as source:
        async for event in source.aiter_sse():
            messages.append(StreamMessage(event.event, json.loads(event.data), event.id))


async def read_with_curl(url, messages):
    """Read a stream with curl."""
    done = await trio.run_process(["curl", "-sSN", "--fail", url], capture_stdout=True)
    messages += [StreamMessage(e.event, json.loads(e.data), e.id) for e in Decoder().feed(done.stdout)]


async def publish(client, job, step):
    """Publish a percentage in one of the five dialects, each in turn."""
    bodies = [
        (f"/api/sessions/{job}/progress", {"progress": step, "message": "m"}),
        (
            f"/api/interaction/events/{job}",
            {"type": "processing", "data": {"stage": "tts", "progress": step / 100}},
        ),
        (f"/api/jobs/{job}/progress", {"stage": "other", "progress": step}),
        (f"/api/v1/sessions/{job}/status", {"status": "transcribing", "progress": step, "extra": 1}),
        ("/api/v1/pubsub/push", pubsub_push({"jobId": job, "status": "processing", "progress": step}, step)),
    ]
    path, body = bodies[step % len(bodies)]
    (await client.post(path, json=body)).raise_for_status()


def pubsub_push(update, number):
    """Return the envelope in which Pub/Sub pushes an update."""
    data = base64.b64encode(json.dumps(update).encode()).decode()
    return {"message": {"data": data, "messageId": str(number)}, "subscription": "s"}


@pytest.mark.parametrize("succeeds", [True, False], ids=["completed", "failed"])
async def test_one_job_through_all_five_dialects(succeeds):
    """The job is created in one, published in all five in turn, and watched in all by httpx-sse and curl.

    All clients get every percentage, once and in order, and the same end.
    """
    require_program("curl")
    seen = {(dialect, client): [] for dialect in STREAMS for client in ("httpx-sse", "curl")}
    # With a throttle of almost nothing every update that is published is sent.
    async with (
        sseserve.serve(port=0, drain=0.5, throttle=1e-9) as server,
        httpx.AsyncClient(base_url=server.url, timeout=30) as client,
    ):
        job = (await client.post("/api/v1/jobs", json={"topics": ["technology"]})).json()["jobId"]

        def is_received(percent):
            return all(
                any(percent_of(dialect, message) == percent for message in messages)
                for (dialect, name), messages in seen.items()
                if name == "httpx-sse"
            )

        async with trio.open_nursery() as nursery:
            for (dialect, name), messages in seen.items():
                url = server.url + STREAMS[dialect].format(job)
                if name == "curl":
                    nursery.start_soon(read_with_curl, url, messages)
                else:
                    nursery.start_soon(read_with_httpx_sse, client, url, messages)
            while server.app.broker.count_watchers(job).total() < len(seen) or not is_received(0):
                await trio.lowlevel.checkpoint()
            for step in range(1, 41):
                await publish(client, job, step)
                while not is_received(step):
                    await trio.lowlevel.checkpoint()
            await server.tracker.emit(job, "note", {"a": 1})
            status = "completed" if succeeds else "failed"
            await client.post(f"/api/v1/sessions/{job}/status", json={"status": status, "message": "m"})
    for (dialect, name), messages in seen.items():
        percents = [p for p in (percent_of(dialect, message) for message in messages) if p is not None]
        assert percents == list(range(41)), (dialect, name)
        assert [message.data for message in messages if message.event == "note"] == [{"a": 1}]
        assert end_of(dialect, messages[-1]) is succeeds, (dialect, name)
        assert [end_of(dialect, message) for message in messages[:-1]] == [None] * (len(messages) - 1)
