"""How the page looks: colours and shapes on top of Gradio's. Fonts are those of the system: nothing is fetched."""

from typing import Any

FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; padding: 20px 24px 48px !important; }
.html-container { padding: 0 !important; }
footer { display: none !important; }
.os-head { display: flex; align-items: center; gap: 14px; }
.os-head .mark { width: 38px; height: 38px; border-radius: 11px; flex: none;
  background: linear-gradient(135deg, #f97316, #db2777 55%, #6d28d9); display: grid; place-items: center; }
.os-head .mark::after { content: ""; border-left: 13px solid #fff; border-top: 8px solid transparent;
  border-bottom: 8px solid transparent; margin-left: 4px; }
.os-head h1 { font-size: 22px; line-height: 1.1; margin: 0; font-weight: 650; letter-spacing: -0.02em; }
.os-head p { margin: 3px 0 0; color: var(--body-text-color-subdued); font-size: 14px; }
.os-head code { font-size: 12px; padding: 1px 7px; border-radius: 99px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); }
#language { min-width: 190px !important; max-width: 200px; flex: none; background: none; border: none !important;
  padding: 0; align-self: center; height: auto !important; box-shadow: none; outline: none; }
#language .wrap { flex-wrap: nowrap; gap: 6px; }
#make { min-height: 46px; font-size: 16px; border: none; color: #fff;
  background: linear-gradient(100deg, #ea580c, #db2777); }
#make:hover { filter: brightness(1.07); }
.os-stage { position: relative; border-radius: 16px; overflow: hidden; background: #0b0d12; color: #e8eaf0;
  border: 1px solid #1d212b; }
.os-frame { position: relative; width: 100%;
  aspect-ratio: 16 / 10; max-height: 560px; display: grid; place-items: center; overflow: hidden;
  background: radial-gradient(120% 90% at 50% 0%, #1a1f2c 0%, #0b0d12 70%); }
.os-frame video, .os-frame img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain;
  margin: 0 !important; }
.os-idle { text-align: center; color: #8b93a7; font-size: 15px; padding: 24px; }
.os-idle .reel { width: 62px; height: 46px; margin: 0 auto 14px; border: 2px solid #39415a; border-radius: 9px;
  display: grid; place-items: center; }
.os-idle .reel::after { content: ""; border-left: 14px solid #5c6786; border-top: 9px solid transparent;
  border-bottom: 9px solid transparent; margin-left: 4px; }
.os-foot { padding: 14px 18px 16px; display: grid; gap: 10px; }
.os-line { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; font-size: 14px; }
.os-line b { font-weight: 600; font-size: 15px; color: #fff; }
.os-line span { color: #a3abbf; font-variant-numeric: tabular-nums; }
.os-bar { height: 6px; border-radius: 99px; background: #232838; overflow: hidden; }
.os-bar i { display: block; height: 100%; border-radius: 99px; transition: width .4s ease;
  background: linear-gradient(90deg, #f97316, #db2777); }
.os-bar.waits i { width: 32%; animation: os-waits 1.6s ease-in-out infinite alternate; }
@keyframes os-waits { from { margin-left: 0 } to { margin-left: 68% } }
.os-prompt { color: #cfd4e2; font-size: 14px; line-height: 1.45; display: -webkit-box; -webkit-line-clamp: 3;
  -webkit-box-orient: vertical; overflow: hidden; }
.os-wrong { color: #fda4af; font-size: 14px; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 220px; overflow: auto; }
.os-chips { display: flex; flex-wrap: wrap; gap: 6px; }
.os-chips span { font-size: 12px; padding: 2px 9px; border-radius: 99px; background: #1b202d; color: #b6bed1;
  border: 1px solid #2a3041; font-variant-numeric: tabular-nums; }
.os-gets { display: flex; gap: 8px; }
.os-gets a { font-size: 13px; padding: 5px 12px; border-radius: 9px; background: #232a3a; color: #fff !important;
  text-decoration: none !important; }
.os-gets a:hover { background: #313a50; }
.os-title { font-size: 17px; font-weight: 620; margin: 18px 0 0; letter-spacing: -0.01em; }
.os-note { color: var(--body-text-color-subdued); font-size: 14px; }
.os-cards { display: grid !important; gap: 16px !important;
  grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)) !important; }
.os-card { border: 1px solid var(--border-color-primary); border-radius: 14px; overflow: hidden; padding: 0 !important;
  background: var(--background-fill-primary); gap: 0 !important; min-width: 0 !important; }
.os-card .os-shot { aspect-ratio: 16 / 10; background: #0b0d12; }
.os-card video, .os-card img { width: 100%; height: 100%; object-fit: contain; display: block; margin: 0 !important; }
.os-card .os-idle { height: 100%; display: grid; place-items: center; }
.os-do button { min-width: 70px !important; }
.os-card .os-about { padding: 12px 14px 8px; display: grid; gap: 9px; }
.os-card .os-prompt { color: var(--body-text-color); -webkit-line-clamp: 2; min-height: 2.9em; }
.os-card .os-chips span { background: var(--background-fill-secondary); color: var(--body-text-color-subdued);
  border-color: var(--border-color-primary); }
.os-card .os-gets a { background: var(--background-fill-secondary); color: var(--body-text-color) !important;
  border: 1px solid var(--border-color-primary); }
.os-card .os-wrong { color: #be123c; max-height: 90px; font-size: 13px; }
.os-card .os-do { padding: 4px 12px 12px; gap: 8px; }
@media (max-width: 640px) {
  .gradio-container { padding: 12px 12px 32px !important; }
  .os-head p, .os-head code { display: none; }
}
"""


def theme() -> Any:
    """Gradio's plain theme in our colours, with the system's fonts."""
    import gradio as gr

    made = gr.themes.Base(
        primary_hue="orange", secondary_hue="pink", neutral_hue="slate", radius_size="lg", font=FONTS, font_mono=MONO
    )
    return made.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_width="1px",
        block_shadow="none",
        block_label_text_weight="500",
        block_title_text_weight="500",
        input_background_fill="*background_fill_primary",
        button_large_radius="*radius_lg",
        checkbox_label_padding="5px 10px",
    )
