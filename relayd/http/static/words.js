// The texts of the page, in its languages.

import { kept } from "./storage.js";

const WORDS = {
  en: {
    skip: "To the content", leave: "Log out", login: "Log in", login_title: "Log in to the relay", token: "Token",
    token_help: "The token stays in this tab, until you log out or close it. The relay’s operator creates one with “relayd token create --role client --name NAME”.",
    admin: "Administration", load_admin: "{workers} workers, {queued} queued", back: "Back", admin_users: "Users", admin_tokens: "Tokens", admin_spaces: "Spaces",
    add_user: "Add a user", add_invite: "Invite", add_token: "Create a token", add_space: "Create a space",
    user_active: "with a password", user_proxy: "at the proxy", user_invited: "invited", set_role: "Role", set_password: "Password",
    remove: "Remove", revoke: "Revoke", resume: "Resume", settings: "Settings", do_it: "Do it",
    as_command: "The same as a command:", invite_note: "Shown once. Give this link to one person; it is good for one registration:",
    token_note: "Shown once. Whoever has this token may use it:", ask_role: "Set the role of {name}? All logins of the user end.",
    ask_password: "Set the password of {name}? All logins of the user end.", ask_remove: "Remove {name}?", ask_revoke: "Revoke the token of {name}? Its connections are closed.",
    ask_pause: "Pause {name}? What runs goes on, nothing new is started or accepted.", ask_resume: "Resume {name}?", ask_settings: "Settings of {name}",
    ask_configured: "Settings of {name}, which relayd.toml defines: change them there", field_name: "Name", field_role: "Role", field_password: "Password",
    field_spaces: "Spaces, such as tts or tts*; none for all", field_expires: "Expires: 12h, 30d or a date",
    user_name: "Name", user_password: "Password", or_token: "Or with a token", account: "Change password", close: "Close",
    user_help: "With the name and the password that the relay’s operator gave you.", bad_password: "The name or the password is wrong.",
    register_title: "You are invited", register_help: "Choose a name and a password of at least {n} characters.", register: "Register",
    old_password: "Present password", new_password: "New password", account_help: "At least {n} characters. You stay logged in here, and nowhere else.",
    password_changed: "The password is changed. All other logins have ended.", session_over: "Your login has ended. Log in again.",
    logging_in: "Logging in…", bad_token: "The relay does not know this token, or it was revoked or has expired. Check it, or ask for a new one.",
    unreachable: "The relay does not answer, or does not allow this page’s address. Try again; if that does not help, ask the relay’s operator (allowed_origins in relayd.toml).",
    link_on: "✓ Connected as {who}", link_off: "✗ Not connected, reconnecting…", link_wait: "Connecting…",
    no_recording: "Browsers allow recording only over HTTPS or on the relay’s own machine: open this page there, or through “ssh -L”. Files can be sent.",
    ask_title: "New request", space: "Space", text: "Text", text_hint: "Text to speak", more: "More settings", submit: "Submit",
    keys: "Ctrl + Enter submits", count: "{n} of {most}", standard: "Default ({value})", standard_none: "Default",
    yes: "Yes", no: "No", no_json: "{name}: this is not valid JSON.", too_long: "Text and settings have {size}; the limit is {most}.",
    ready: "✓ Connected", no_worker: "✗ Not connected", paused: "✗ Paused", draining: "✗ Draining", no_spaces: "✗ Your token may not use any space",
    load_ready: "{busy} of {slots} slots busy, {queued} waiting", load_no_worker: "No worker is connected. The form is enabled again when one connects.",
    load_draining: "Its worker finishes what it runs and takes nothing new. The form is enabled again when a worker accepts requests.",
    load_paused: "An operator has paused this space. The form is enabled again when it resumes.", load_off: "No connection to the relay. The form is enabled again when it is back.",
    required: "required", optional: "optional", record: "Record", stop: "Stop", recorded: "Recorded: {s}. Choosing a file replaces it.",
    recording: "Recording… {s}", no_microphone: "The microphone cannot be used: {why}", too_large: "{name} has {size}; the limit is {most}.",
    wrong_type: "{name} has the type {kind}; accepted types are {kinds}.", need_input: "{name} is required: choose a file, or record one.",
    tab_requests: "Requests", tab_talk: "Talk", talk_list: "Conversation", talk_new: "New conversation", talk_delete: "Delete",
    talk_delete_sure: "Delete this conversation, with all that was said in it?", talk_none: "Say something. The relay keeps the conversation, also for your other devices.",
    talk_turns: "What was said", talk_text: "What you say", talk_keys: "Enter sends, and interrupts a reply", talk_stop: "Stop", talk_send: "Send",
    talk_call: "Call", talk_calling: "Calling…", talk_hang_up: "Hang up", talk_mute: "Mute",
    call_lost: "The call did not get through, or was lost. Replies are played by the page again.",
    talk_listen: "Microphone", talk_deaf: "Microphone off", talk_insecure: "Browsers give pages the microphone over HTTPS only.",
    talk_you: "You", talk_them: "Reply", talk_again: "Listen again", talk_interrupted: "interrupted", talk_waiting: "waits for the reply before",
    talk_lost: "The relay did not get this. Send it again.", talk_blocked: "Browsers do not start sound by themselves after a page was loaded: press “Listen again”, or say something.",
    list_title: "My requests", none: "None yet. Your requests are listed here, and stay when this page is reloaded.",
    sending: "Sending", sending_part: "Sending {percent} %", accepted: "Accepted", queued: "Position {position} of {of}",
    queued_eta: "Position {position} of {of}, starts in about {eta}", queued_soon: "Position {position} of {of}, starts soon", loading: "Loading the model", generating: "Generating",
    encoding: "Encoding", completed: "✓ Completed", failed: "✗ Failed", cancelled: "Cancelled", stopping: "Cancelling…",
    rejected: "✗ Rejected", lost: "✗ No longer kept", again: "Waiting for the relay",
    unheard: "Not connected to the relay", away: "Worker lost, waiting up to {s} for it", again_in: "Refused for now, sent again in {s}",
    queued_again: "Queued again: {why}.", waits_no_worker: "No worker is connected; the request waits for one.",
    waits_paused: "An operator has paused the space; the request waits until it is resumed.", waits_draining: "The worker takes no new requests; the request waits for one that does.",
    no_audio: "The engine made no audio of this.",
    play: "Play", pause: "Pause", seek: "Position in the audio", place: "{at} of {all}", gathering: "waiting for more…", blocked: "Press play to listen: browsers do not start sound automatically after a page was loaded.",
    cancel: "Cancel", load: "Listen again", download: "Download", forget: "Remove", copy: "{verb}: {text}",
    run: "Processing time", length: "Audio", rtf: "Real-time factor", first: "First sound after", wait: "Waited",
    not_kept: "The relay no longer keeps this result.", anew: "The request was restarted on another worker.",
    heard: "The audio up to here can be played and downloaded.", output: "Output",
    said_accepted: "Request accepted.", said_queued: "Position {position} of {of} in the queue.", said_started: "Your request has started.",
    said_completed: "Request completed: {s} of audio.", said_done: "Request completed.", said_failed: "Request failed: {why}", said_cancelled: "Request cancelled.",
    said_away: "The worker was lost. The relay waits for it to come back.",
    lost_link: "The connection to the relay was lost. Reconnecting; nothing is lost.", back_link: "Connected again.",
    docs: "HTTP API",
    server: "Served by {server}. Audio is played while it is generated.", codes: {},
  },
  zh: {
    skip: "跳到正文", leave: "退出登录", login: "登录", login_title: "登录到中继", token: "令牌",
    token_help: "令牌只保存在此标签页中，退出登录或关闭标签页后即清除。中继的管理员用 “relayd token create --role client --name 名字” 生成令牌。",
    admin: "管理", load_admin: "{workers} 个工作者，{queued} 个排队", back: "返回", admin_users: "用户", admin_tokens: "令牌", admin_spaces: "空间",
    add_user: "添加用户", add_invite: "邀请", add_token: "创建令牌", add_space: "创建空间",
    user_active: "有密码", user_proxy: "在代理处登录", user_invited: "已邀请", set_role: "角色", set_password: "密码",
    remove: "移除", revoke: "撤销", resume: "恢复", settings: "设置", do_it: "执行",
    as_command: "相当于命令：", invite_note: "只显示一次。把这个链接交给一个人；它可以注册一次：",
    token_note: "只显示一次。谁有这个令牌，谁就能使用它：", ask_role: "设置 {name} 的角色？该用户的所有登录都会结束。",
    ask_password: "设置 {name} 的密码？该用户的所有登录都会结束。", ask_remove: "移除 {name}？", ask_revoke: "撤销 {name} 的令牌？它的连接会被关闭。",
    ask_pause: "暂停 {name}？正在运行的会继续，不再开始或接受新的请求。", ask_resume: "恢复 {name}？", ask_settings: "{name} 的设置",
    ask_configured: "{name} 的设置由 relayd.toml 定义：请在那里修改", field_name: "名字", field_role: "角色", field_password: "密码",
    field_spaces: "空间，例如 tts 或 tts*；不填表示全部", field_expires: "到期：12h、30d 或一个日期",
    user_name: "名字", user_password: "密码", or_token: "或者使用令牌", account: "修改密码", close: "关闭",
    user_help: "使用中继管理员给您的名字和密码。", bad_password: "名字或密码不正确。",
    register_title: "您已受到邀请", register_help: "请选择一个名字，以及至少 {n} 个字符的密码。", register: "注册",
    old_password: "当前密码", new_password: "新密码", account_help: "至少 {n} 个字符。您在这里保持登录，其他地方的登录都会结束。",
    password_changed: "密码已修改。其他登录都已结束。", session_over: "您的登录已结束，请重新登录。",
    logging_in: "正在登录…", bad_token: "中继不认识这个令牌，或者它已被撤销或过期。请检查，或索取新的令牌。",
    unreachable: "中继没有应答，或者不接受本页面的地址。请重试；若仍然如此，请联系中继的管理员（relayd.toml 中的 allowed_origins）。",
    link_on: "✓ 已连接：{who}", link_off: "✗ 未连接，正在重试…", link_wait: "正在连接…",
    no_recording: "浏览器只允许通过 HTTPS 打开的页面或中继本机上的页面录音：请改用 HTTPS，或通过 “ssh -L” 打开。文件可以发送。",
    ask_title: "新请求", space: "空间", text: "文本", text_hint: "要朗读什么？", more: "更多设置", submit: "提交",
    keys: "Ctrl + Enter 提交", count: "{n} / {most}", standard: "默认（{value}）", standard_none: "默认",
    yes: "是", no: "否", no_json: "{name}：不是有效的 JSON。", too_long: "文本和设置共 {size}，最多允许 {most}。",
    ready: "✓ 已连接", no_worker: "✗ 未连接", paused: "✗ 已暂停", draining: "✗ 正在排空", no_spaces: "✗ 没有您的令牌可以使用的空间",
    load_ready: "{slots} 个槽位中 {busy} 个忙，{queued} 个请求在等待", load_no_worker: "没有工作者在线。工作者回来后，表单会自动恢复。",
    load_draining: "它的工作者只完成正在运行的请求，不再接受新的。有工作者接受请求后，表单会自动恢复。",
    load_paused: "操作员暂停了这个空间。恢复后，表单会自动恢复。", load_off: "与中继的连接已断开。连接恢复后，表单会自动恢复。",
    required: "必需", optional: "可选", record: "录音", stop: "停止", recorded: "已录音：{s}。选择文件会替换它。",
    recording: "正在录音… {s}", no_microphone: "无法使用麦克风：{why}", too_large: "{name} 大小为 {size}，最多允许 {most}。",
    wrong_type: "{name} 的类型是 {kind}；可接受的类型：{kinds}。", need_input: "需要 {name}：请选择文件或录音。",
    tab_requests: "请求", tab_talk: "交谈", talk_list: "对话", talk_new: "新对话", talk_delete: "删除",
    talk_delete_sure: "删除这个对话以及其中说过的一切吗？", talk_none: "说点什么吧。中继会保存对话，您的其他设备也能看到。",
    talk_turns: "说过的话", talk_text: "您要说的话", talk_keys: "回车发送，并打断正在进行的回答", talk_stop: "停止", talk_send: "发送",
    talk_call: "通话", talk_calling: "正在呼叫…", talk_hang_up: "挂断", talk_mute: "静音",
    call_lost: "通话没有接通，或已中断。回答重新由页面播放。",
    talk_listen: "麦克风", talk_deaf: "关闭麦克风", talk_insecure: "浏览器只允许 HTTPS 页面使用麦克风。",
    talk_you: "您", talk_them: "回答", talk_again: "重新收听", talk_interrupted: "被打断", talk_waiting: "在等待前一个回答",
    talk_lost: "中继没有收到这句话，请重新发送。", talk_blocked: "页面加载后，浏览器不会自动播放声音：请按“重新收听”，或者说点什么。",
    list_title: "我的请求", none: "还没有请求。您提交的请求会列在这里，重新加载页面后仍然保留。",
    sending: "正在发送", sending_part: "正在发送 {percent}%", accepted: "已接受", queued: "第 {position} 位，共 {of} 位",
    queued_eta: "第 {position} 位，共 {of} 位，约 {eta} 后开始", queued_soon: "第 {position} 位，共 {of} 位，即将开始", loading: "正在加载模型", generating: "正在生成",
    encoding: "正在编码", completed: "✓ 已完成", failed: "✗ 失败", cancelled: "已取消", stopping: "正在取消…",
    rejected: "✗ 被拒绝", lost: "✗ 已不再保留", again: "正在等待中继",
    unheard: "与中继的连接已断开", away: "工作者已断线，最多等待 {s}", again_in: "暂时被拒绝，{s}后重新发送",
    queued_again: "重新排队：{why}。", waits_no_worker: "没有工作者在线，请求在等待。",
    waits_paused: "操作员暂停了这个空间，恢复之前请求会等待。", waits_draining: "工作者不接受新的请求，请求在等待另一个工作者。",
    no_audio: "引擎没有为此生成音频。",
    play: "播放", pause: "暂停", seek: "播放位置", place: "{at}，共 {all}", gathering: "等待更多音频…", blocked: "请按播放键收听：页面重新加载后，浏览器不会自动播放声音。",
    cancel: "取消", load: "重新收听", download: "下载", forget: "移除", copy: "{verb}：{text}",
    run: "处理时间", length: "音频", rtf: "实时率", first: "首个声音", wait: "等待",
    not_kept: "中继已不再保留这个结果。", anew: "请求已在另一个工作者上重新开始。",
    heard: "到此为止的音频可以播放和下载。", output: "输出",
    said_accepted: "请求已接受。", said_queued: "排在第 {position} 位，共 {of} 位。", said_started: "您的请求正在生成。",
    said_completed: "请求已完成：音频 {s}。", said_done: "请求已完成。", said_failed: "请求失败：{why}", said_cancelled: "请求已取消。",
    said_away: "工作者已断线，中继正在等它回来。",
    lost_link: "与中继的连接已断开，正在重新连接；不会丢失任何内容。", back_link: "已重新连接。",
    docs: "HTTP 接口（英文）",
    server: "由 {server} 提供。音频边生成边播放。",
    codes: {
      protocol_error: "协议错误", unknown_type: "未知消息类型", unauthenticated: "未登录", forbidden: "没有权限", space_not_found: "没有这个空间",
      space_paused: "空间已暂停", no_worker: "没有工作者在线", invalid_params: "参数无效", input_missing: "缺少输入", input_too_large: "输入过大",
      input_mismatch: "输入与声明不符", queue_full: "队列已满", rate_limited: "请求过于频繁", id_conflict: "编号冲突", request_not_found: "没有这个请求",
      queue_timeout: "排队超时", run_timeout: "运行超时", idle_timeout: "工作者长时间没有输出", worker_lost: "工作者已断线", engine_failed: "引擎出错",
      model_not_loaded: "模型没有加载", result_too_large: "结果过大", slow_consumer: "接收过慢", storage_full: "存储已满", shutting_down: "中继正在关闭",
      internal: "中继内部错误", frames_missing: "结果不完整",
    },
  },
};

export let language = kept("localStorage", "language") ?? (/^zh/i.test(navigator.language) ? "zh" : "en");
if (!Object.hasOwn(WORDS, language)) language = "en";

export function setLanguage(next) {
  language = next;
  kept("localStorage", "language", next);
}

export function say(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export function seconds(s, digits = s < 1 ? 2 : 1) {
  const units = language === "zh" ? [" 秒", " 分 "] : [" s", " min "];
  if (s < 60) return `${s.toFixed(digits)}${units[0]}`;
  return `${Math.floor(s / 60)}${units[1]}${Math.floor(s % 60)}${units[0]}`;
}

export const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}.${Math.floor((s * 10) % 10)}`;

export const size = (bytes) => (bytes < 1048576 ? `${Math.ceil(bytes / 1024)} KiB` : `${(bytes / 1048576).toFixed(1)} MiB`);

/** An error for the user: the relay's message; in Chinese, after the meaning of its code. */
export function fault({ code, message, details }) {
  const meaning = WORDS[language].codes[code];
  const fields = Object.entries(details ?? {}).filter(([, wrong]) => typeof wrong === "string");
  const said = [message, ...fields.map(([field, wrong]) => (field ? `${field}: ${wrong}` : wrong))].filter(Boolean).join(" · ");
  return meaning ? `${meaning}${said ? `（${said}）` : ""}` : said || code;
}
